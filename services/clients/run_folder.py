"""Make, find and lock the folder of a training run: output_dir/NAME/RUN_ID, to whose newest NAME/latest leads.

    folder = RunFolder.create(Path("outputs"), "tiny_srpo", record={"config": {...}})
    RunFolder.find(Path("outputs"), "tiny_srpo", "latest") == folder
    with folder.locked():
        ...                         # nobody else trains this run

A run writes all its files there, so that no run touches another's.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.clients.delivered import Delivered

LATEST = "latest"
_RECORD, _LOCK, _STOP, _STOPPED = "run.json", "lock", "stop", "stopped"


class RunFolderError(ValueError):
    """There is no such run, or it cannot be taken up; the text names the folder and the cure."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A request to stop: why, and since when (seconds since 1970).

    >>> StopRequest(reason="SIGTERM", at=1795842401.5)
    """

    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run.

    >>> RunFolder(Path("outputs/tiny_srpo/20261128-051200-3f9a")).id
    '20261128-051200-3f9a'
    """

    path: Path

    @property
    def id(self) -> str:
        """The run's id, which sorts by the time of its start (UTC)."""
        return self.path.name

    @classmethod
    def create(cls, output_dir: Path, name: str, record: Mapping[str, Any]) -> RunFolder:
        """Make a folder of its own for a new run, and let `latest` lead to it."""
        folder = cls(output_dir / name / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")
        folder.path.mkdir(parents=True)
        folder.write_record(record)
        folder._become_latest()
        return folder

    @classmethod
    def find(cls, output_dir: Path, name: str, wanted: str = LATEST) -> RunFolder:
        """Return the run of this id, or the newest one. Raise RunFolderError if there is none."""
        runs = cls.all(output_dir, name)
        if not runs:
            raise RunFolderError(f"no run of {name!r} in {output_dir / name}: start one without --resume")
        if wanted == LATEST:
            return runs[-1]
        for run in runs:
            if wanted in (run.id, run.mlflow_run_id):
                return run
        raise RunFolderError(f"no run {wanted!r} in {output_dir / name}; there are {', '.join(run.id for run in runs)}")

    @classmethod
    def all(cls, output_dir: Path, name: str) -> list[RunFolder]:
        """Return the runs of a name, oldest first."""
        records = sorted((output_dir / name).glob(f"*/{_RECORD}"))
        return [cls(each.parent) for each in records if not each.parent.is_symlink()]

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run that records this run; None until MLflow has answered."""
        delivered = Delivered.load(self.path)
        return delivered.run_id if delivered is not None else None

    def record(self) -> dict[str, Any]:
        """Return what `create` or `write_record` wrote last. Raise RunFolderError if it cannot be read."""
        try:
            record: dict[str, Any] = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path} is no folder of a run: {error}") from error
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace run.json at once: it is whole whenever this process is killed."""
        self._write(_RECORD, json.dumps(record, indent=2))

    @property
    def stop_requested(self) -> StopRequest | None:
        """The request to stop that is in force."""
        path = self.path / _STOP
        try:
            return StopRequest(path.read_text(encoding="utf-8").strip(), path.stat().st_mtime)
        except FileNotFoundError:
            return None

    @property
    def is_stop_saved(self) -> bool:
        """Whether the run has saved the checkpoint from which it can go on after the request."""
        return (self.path / _STOPPED).exists()

    def request_stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and to stop. A request that is there already stays."""
        if self.stop_requested is None:
            self._write(_STOP, reason)

    def confirm_stop(self) -> None:
        """Say that the checkpoint is saved."""
        self._write(_STOPPED, "saved")

    def forget_stop(self) -> None:
        """Remove the request and what was answered to it."""
        for name in (_STOP, _STOPPED):
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run within the context; the lock ends with this process. Raise RunFolderError if another holds it.

        Forgets what asked an earlier attempt to stop.
        """
        with (self.path / _LOCK).open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                raise RunFolderError(
                    f"run {self.id} is training already ({lock.read().strip()}): stop it first, or start a new run "
                    "without --resume"
                ) from error
            lock.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
            self.forget_stop()
            yield

    def _write(self, name: str, text: str) -> None:
        draft = self.path / f"{name}.draft"
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.path / name)

    def _become_latest(self) -> None:
        link = self.path.parent / LATEST
        draft = link.with_name(f".{LATEST}-{self.id}")
        draft.symlink_to(self.id, target_is_directory=True)
        draft.replace(link)
