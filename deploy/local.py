"""`make up` and `make down`: run Ray, the reward service and MLflow on this machine, for one person.

    python -m deploy.local up      start what is not running, and wait until all answer
    python -m deploy.local down    stop what `up` started, and nothing else

All services listen on loopback. Ray's internal ports listen everywhere, so its token authentication is on.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from deploy.haproxy import proxy_environment
from deploy.mlflow_database import ensure_database
from deploy.process import OwnedProcess
from deploy.serve_api import deploy, get, rewards_run
from deploy.settings import (
    EXIT_INTERRUPTED,
    HOST,
    ROOT,
    LocalError,
    Settings,
    add_options,
    check_port,
    free_port,
    settings,
)
from deploy.signals import end_as_interrupted
from services.clients.jobs import ADDRESS_VARIABLES, STOP_WAIT, Jobs, JobsError, request_headers, token_path
from services.contract import READY_PATH

_READY_TIMEOUT_S = 180.0  # about 15 s on two idle cores
_POLL_S = 0.2
_REMIND_S = 10.0
_NAMES = ("ray", "mlflow")


class _EndedEarly(LocalError):
    """A process ended while the program waited for its answer."""


class LocalServices:
    """The services of one run_dir. `seconds`: how long each took to answer, from the start of `up`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ray = OwnedProcess("ray", settings.run_dir)
        self.mlflow = OwnedProcess("mlflow", settings.run_dir)
        self.seconds: dict[str, float] = {}
        self._started_at = 0.0
        self._is_over = threading.Event()

    def up(self, names: Collection[str] = _NAMES) -> list[OwnedProcess]:
        """Start those of the named services that do not run, and return them once all answer. Raise LocalError.

        After a failure or an interrupt, stop what this call started.
        """
        self._started_at = time.monotonic()
        self._is_over.clear()
        wanted = [process for process in (self.ray, self.mlflow) if process.name in names]
        missing = [process for process in wanted if not process.is_running()]
        self._check_ports(missing)
        self._serve_config()  # a file that cannot be read is said before anything starts
        try:
            for process in missing:
                process.stop()  # what a crash left of it
                self._start(process)
            self._wait_for_all(wanted)
        except BaseException:
            self.down(missing)
            raise
        return missing

    def down(self, processes: Sequence[OwnedProcess] | None = None) -> list[str]:
        """Stop the named services, by default all, and return the names of those that were running."""
        chosen = [self.ray, self.mlflow] if processes is None else list(processes)
        temp_dir = self.ray.notes().get("temp_dir")
        with ThreadPoolExecutor(2) as pool:
            stopped = [process.name for process, was in zip(chosen, pool.map(_stop, chosen), strict=True) if was]
        if temp_dir is not None and self.ray in chosen:
            shutil.rmtree(temp_dir, ignore_errors=True)  # logs and sockets; a straggler's last write must not fail us
        return stopped

    def end_jobs(self) -> None:
        """Stop the running Ray jobs and wait until they have ended, so that each closes its MLflow run.

        Raise JobsError. If Ray does not answer, return: its jobs end with it.
        """
        url = self.ray.notes().get("dashboard_url")  # not the settings' now: at another port another Ray may answer
        if url is not None and self.ray.is_running() and get(f"{url}/api/version", request_headers()) is not None:
            jobs = Jobs(url)
            for job in jobs.list():
                if job.is_alive:
                    print(f"stopping job {job.id} ({job.run})", flush=True)
                    jobs.end(job.id, tell=partial(print, flush=True))

    def _start(self, process: OwnedProcess) -> None:
        print(f"starting {process.name} (log: {process.log_file})", flush=True)
        {"ray": self._start_ray, "mlflow": self._start_mlflow}[process.name]()

    def _start_ray(self) -> None:
        ensure_token()
        temp_dir = tempfile.mkdtemp(prefix="srpo-ray-")  # not under .run: paths of Unix sockets end at 107 bytes
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            f"--dashboard-host={HOST}",
            f"--dashboard-port={self.settings.dashboard_port}",
            f"--temp-dir={temp_dir}",
            # slots, not cores: the reward service, two workers and the job's driver take turns
            f"--num-cpus={max(4, os.cpu_count() or 1)}",
            f"--object-store-memory={256 * 2**20}",  # nothing large travels between actors
            *(f"--{name}={free_port()}" for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port")),
        ]
        if sys.platform == "linux":
            command.append("--node-ip-address=127.0.0.2")  # loopback too; Ray replaces 127.0.0.1 by an outer address
        env = {
            **dict.fromkeys(ADDRESS_VARIABLES),  # jobs would look for another cluster there
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # `python` in jobs
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
            "RAY_COLOR_PREFIX": "0",  # what jobs print is kept in files
            **STOP_WAIT,  # also of jobs that Ray's own command submits
            **proxy_environment(temp_dir),
        }
        self.ray.start(command, ROOT, env, temp_dir=temp_dir, dashboard_url=self.settings.dashboard_url)

    def _start_mlflow(self) -> None:
        folder = self.settings.run_dir / "mlflow"
        ensure_database(folder / "mlflow.db")
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.settings.mlflow_port)),
            *("--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes and 1.5 GB that nothing here uses
        self.mlflow.start(command, ROOT, env)

    def _wait_for_all(self, processes: Sequence[OwnedProcess]) -> None:
        waiters = {"ray": self._wait_for_ray_and_rewards, "mlflow": self._wait_for_mlflow}
        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(waiters[process.name]) for process in processes]
            try:
                for wait in as_completed(waits):
                    wait.result()
            finally:
                self._is_over.set()  # after a failure or an interrupt the other wait ends too

    def _wait_for_ray_and_rewards(self) -> None:
        api = f"{self.settings.dashboard_url}/api/serve/applications/"
        self._wait_for_ray(api)
        deploy(api, self._serve_config())
        self._wait("reward service", self.ray, lambda: rewards_run(api) and self._rewards_answer())

    def _wait_for_ray(self, api: str) -> None:
        """Start Ray again after its fixed limit of 30 s: the first imports after an installation can take longer."""
        try:
            self._wait("Ray", self.ray, lambda: get(api, request_headers()) is not None)
        except _EndedEarly:
            print("Ray gave up on a slow start; starting it once more", flush=True)
            self.down([self.ray])
            self._start_ray()
            self._wait("Ray", self.ray, lambda: get(api, request_headers()) is not None)

    def _wait_for_mlflow(self) -> None:
        self._wait("MLflow", self.mlflow, lambda: get(f"{self.settings.mlflow_url}/health") is not None)

    def _rewards_answer(self) -> bool:
        return get(f"{self.settings.serve_url}{READY_PATH}") is not None

    def _serve_config(self) -> dict[str, Any]:
        path = self.settings.serve_config
        try:
            config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise LocalError(f"cannot read {path} (--serve-config or SRPO_SERVE_CONFIG): {error}") from error
        if not isinstance(config, dict):
            raise LocalError(f"{path} (--serve-config or SRPO_SERVE_CONFIG) must hold keys and values, not {config!r}")
        config["http_options"] = {**config.get("http_options", {}), "host": HOST, "port": self.settings.serve_port}
        return config

    def _wait(self, what: str, process: OwnedProcess, is_ready: Callable[[], bool]) -> None:
        began = reminded = time.monotonic()
        while not is_ready():
            now = time.monotonic()
            if not process.is_running():
                raise _EndedEarly(f"{process.name} ended while starting; its last words:\n{process.last_lines()}")
            if now - began > _READY_TIMEOUT_S:
                raise LocalError(f"{what} did not answer in {_READY_TIMEOUT_S:g} s; see {process.log_file}")
            if now - reminded > _REMIND_S:
                print(f"waiting for {what} ({now - began:.0f} s)", flush=True)
                reminded = now
            if self._is_over.wait(_POLL_S):
                raise LocalError(f"gave up waiting for {what}")
        self.seconds[what] = round(time.monotonic() - self._started_at, 1)
        print(f"{what} is up ({self.seconds[what]:.1f} s)", flush=True)

    def _check_ports(self, missing: Sequence[OwnedProcess]) -> None:
        ports = {
            self.ray: {"dashboard": self.settings.dashboard_port, "serve": self.settings.serve_port},
            self.mlflow: {"mlflow": self.settings.mlflow_port},
        }
        for process in missing:
            for name, port in ports[process].items():
                check_port(name, port)


def ensure_token() -> None:
    """Make Ray's token, if there is none; without it anyone on the network could run code."""
    path = token_path()
    if "RAY_AUTH_TOKEN" not in os.environ and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32), encoding="utf-8")


def _stop(process: OwnedProcess) -> bool:
    return process.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `up` or `down`; return exit code 0, or 1 with what failed and what to do on stderr."""
    parser = argparse.ArgumentParser("deploy.local", description="Services on this machine.")
    parser.add_argument("action", choices=("up", "down"))
    add_options(parser)
    args = parser.parse_args(arguments)
    services = LocalServices(settings(args))
    try:
        return _up(services) if args.action == "up" else _down(services)
    except LocalError as error:
        print(f"make {args.action}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"make {args.action}: interrupted; what it started is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _up(services: LocalServices) -> int:
    started = services.up()
    print("started: " + (", ".join(process.name for process in started) or "nothing, all was up"))
    print(f"reward service  {services.settings.serve_url}/docs")
    print(f"MLflow          {services.settings.mlflow_url}")
    print(f"Ray             {services.settings.dashboard_url}  (for Ray's own commands: export RAY_AUTH_MODE=token)")
    return 0


def _down(services: LocalServices) -> int:
    try:
        services.end_jobs()
    except JobsError as error:
        print(f"make down: jobs are cut off: {error}", file=sys.stderr)
    print("stopped: " + (", ".join(services.down()) or "nothing, nothing was up"))
    return 0


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
