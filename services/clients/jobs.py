"""Submit, list, follow and stop Ray jobs. No other file imports Ray's job client.

jobs = Jobs("http://127.0.0.1:8265")
job_id = jobs.submit(Path("deploy/runs/tiny_srpo.yaml"))
for text in jobs.follow(job_id):
    print(text, end="")
assert jobs.status(job_id) == "SUCCEEDED"
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from services.clients.environment import carried

T = TypeVar("T")
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports the end of every log
DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # where `make up` starts Ray's dashboard, and Ray's own default
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to the address that it is given
# Ray kills a job this long after it asked it to end. A training writes a checkpoint meanwhile; by default it has 3 s.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "35"}
_ENDS_WITHIN_S = 45.0  # those 35 s, and what Ray itself takes
ALIVE = ("PENDING", "RUNNING")
_POLL_S = 0.2
_TELL_S = 5.0


class JobsError(RuntimeError):
    """The cluster did not accept the request; the text names its address or the job."""


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job.

    >>> Job(id="raysubmit_x", run="deploy/runs/tiny_srpo.yaml", status="RUNNING").is_alive
    True
    """

    id: str
    run: str
    status: str

    @property
    def is_alive(self) -> bool:
        """Whether the job has not ended."""
        return self.status in ALIVE


class Jobs:
    """The jobs of one cluster. Every method raises JobsError if nothing answers at the address of its dashboard."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        self._client: JobSubmissionClient = self._ask(lambda: _client(address))

    def submit(
        self, run_file: Path, arguments: Sequence[str] = (), program: str = "trainer.launch", num_gpus: int = 0
    ) -> str:
        """Start `python -m program run_file arguments…` as a Ray job and return its id.

        `num_gpus` are for the program itself; trainings request the GPUs of their workers. The job runs in the caller's
        folder with the caller's Python, so the cluster must share the disk. For other clusters use
        `ray job submit --working-dir . -- python -m trainer.launch RUN.yaml`.

        The job and its workers get the variables that environment.py names, keys and tokens among them, as the job's
        runtime environment. Ray shows that to whoever has the cluster's token, and each node writes it into its
        runtime_env_agent.log. Where that is too many, set the variables on the nodes and not at the caller.
        """
        command = shlex.join([sys.executable, "-m", program, str(run_file), *arguments])
        entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {command}"
        return self._ask(
            lambda: self._client.submit_job(
                entrypoint=entrypoint,
                metadata={"run": str(run_file)},
                runtime_env={"env_vars": carried(os.environ) | STOP_WAIT},
                entrypoint_num_gpus=num_gpus or None,
            )
        )

    def list(self) -> list[Job]:
        """Return the submitted jobs that the cluster remembers, oldest first."""
        details = self._ask(self._client.list_jobs)
        submitted = sorted((each for each in details if each.submission_id), key=lambda each: each.start_time or 0)
        return [
            Job(each.submission_id, (each.metadata or {}).get("run", each.entrypoint), str(each.status.value))
            for each in submitted
        ]

    def status(self, job_id: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self._ask(lambda: self._client.get_job_status(job_id)).value)

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield what the job prints from its start until its end, in pieces as they come."""
        with asyncio.Runner() as runner:
            pieces = self._client.tail_job_logs(job_id)
            while (piece := self._ask(lambda: runner.run(_next_piece(pieces)))) is not None:
                yield piece

    def stop(self, job_id: str) -> None:
        """Ask the job to end; Ray kills it after STOP_WAIT. A job that has ended stays as it is."""
        self._ask(lambda: self._client.stop_job(job_id))

    def end(self, job_id: str, tell: Callable[[str], object] = print, timeout_s: float = _ENDS_WITHIN_S) -> str:
        """Stop the job unless it has ended, wait until it has, at most `timeout_s`, and return its status.

        Waiting lets the job write a checkpoint and close its MLflow run before the services go down. `tell` gets a line
        every 5 s.
        """
        if (status := self.status(job_id)) in ALIVE:
            self.stop(job_id)
        began = told = time.monotonic()
        while status in ALIVE and (now := time.monotonic()) - began < timeout_s:
            if now - told > _TELL_S:
                tell(f"job {job_id} is ending ({now - began:.0f} s; a training writes a checkpoint)")
                told = now
            time.sleep(_POLL_S)
            status = self.status(job_id)
        return status

    def _ask(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except ConnectionError as error:
            raise JobsError(
                f"no Ray cluster answers at {self.address}: start one with `make up`, or give its address"
            ) from error
        except AuthenticationError as error:
            raise JobsError(
                f"Ray at {self.address} requires its token: put it into {token_path()}, or set RAY_AUTH_TOKEN"
            ) from error
        except RuntimeError as error:  # the client raises it for every refusal
            raise JobsError(f"Ray at {self.address} refused: {str(error).splitlines()[0]}") from error


def _client(address: str) -> JobSubmissionClient:
    """Return a client of this address, whatever address the environment names."""
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        return JobSubmissionClient(address, headers=request_headers())
    finally:
        os.environ.update(hidden)


def token_path() -> Path:
    """Return the file of Ray's token, which Ray's own tools read too."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def request_headers() -> dict[str, str]:
    """Return the HTTP header with Ray's token, if there is one. A cluster without authentication ignores it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    path = token_path()
    return {"Authorization": f"Bearer {path.read_text(encoding='utf-8').strip()}"} if path.is_file() else {}


async def _next_piece(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)
