"""Start and stop a background process safely: in a session of its own, recorded with its start time.

mlflow = OwnedProcess("mlflow", Path(".run"))
mlflow.start([sys.executable, "-m", "mlflow", "server"], cwd=Path.cwd(), env={})
mlflow.is_running()   # also from another program, later
mlflow.stop()         # with all its descendants; another process with the same pid is left alone
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from deploy.settings import LocalError

_GRACE_S = 3.0  # enough to close a database; Ray would drain its node for up to 30 s, which protects nothing here
_KEYS = ("pid", "started", "notes")
_SAME_START_S = 1.0  # psutil reads start times to a clock tick; pids are not reused within a second
_MARK = "SRPO_OWNED_BY"  # in the environment of all that is ours: the record that it belongs to


class OwnedProcess:
    """A named process under `run_dir`: its record in NAME.json, its output in logs/NAME.log."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name = name
        self.log_file = run_dir / "logs" / f"{name}.log"
        self._record_file = run_dir / f"{name}.json"

    def start(self, command: Sequence[str], cwd: Path, env: Mapping[str, str | None], **notes: str) -> None:
        """Start it in the background with our environment and `env`; a value of None removes a variable.

        `notes` are kept in its record until it is stopped.
        """
        given: dict[str, str | None] = {**os.environ, **env, _MARK: str(self._record_file.resolve())}
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env={name: value for name, value in given.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        record = {"pid": child.pid, "started": psutil.Process(child.pid).create_time(), "notes": notes}
        draft = self._record_file.with_suffix(".draft")
        draft.write_text(json.dumps(record), encoding="utf-8")
        draft.replace(self._record_file)  # whole or not there, whenever we are interrupted

    def is_running(self) -> bool:
        """Tell whether the process that was started is alive."""
        return (record := self._record()) is not None and _leader(record) is not None

    def notes(self) -> dict[str, str]:
        """Return the notes given at start; empty if nothing is recorded."""
        record = self._record()
        return dict(record["notes"]) if record else {}

    def stop(self) -> bool:
        """End it and all its descendants, and delete its record; return False if nothing of it was running.

        The leader gets a signal and time to end the others; what is left in its session after that is killed.
        """
        if (record := self._record()) is None:
            return False
        leader, family = _leader(record), _session(record)
        if leader is not None:
            leader.terminate()
            psutil.wait_procs([leader], timeout=_GRACE_S)
        left = {*family, *_session(record)}  # psutil signals no other process that has a pid of these by now
        for process in left:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=_GRACE_S)
        self._record_file.unlink()
        return bool(family)

    def members(self) -> list[psutil.Process]:
        """Return it and all its living descendants."""
        return [] if (record := self._record()) is None else _session(record)

    def last_lines(self, num_lines: int = 15) -> str:
        """Return the end of its output, for an error message."""
        if not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])

    def _record(self) -> dict[str, Any] | None:
        """Return what start() has written. Raise LocalError for a file that it did not write."""
        if not self._record_file.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(self._record_file.read_text(encoding="utf-8"))
            return {"mark": str(self._record_file.resolve()), **{key: record[key] for key in _KEYS}}
        except (ValueError, TypeError, KeyError) as error:
            raise LocalError(
                f"{self._record_file} does not tell which process {self.name} is: stop it by hand, then delete the file"
            ) from error


def _leader(record: Mapping[str, Any]) -> psutil.Process | None:
    try:
        process = psutil.Process(record["pid"])
        is_same = abs(process.create_time() - record["started"]) < _SAME_START_S
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _session(record: Mapping[str, Any]) -> list[psutil.Process]:
    """Return every process of the leader's session; () if the session may be another program's.

    No pid is reused while its session lives, so with a living leader all are ours. After a reboot, or once all of ours
    have ended, the pid of a dead leader may name a session of others.
    """
    leader = _leader(record)
    if leader is None and (psutil.boot_time() > record["started"] or _is_taken(record["pid"])):
        return []
    members = [process for process in psutil.process_iter() if _session_id(process.pid) == record["pid"]]
    living = [process for process in members if not _is_zombie(process.pid)]
    return [process for process in living if leader is not None or _is_ours(process, record)]


def _is_taken(pid: int) -> bool:
    """Tell whether a living process has the pid."""
    return bool(psutil.pid_exists(pid)) and not _is_zombie(pid)


def _is_ours(process: psutil.Process, record: Mapping[str, Any]) -> bool:
    """Tell by its environment whether a process is ours. Ray's workers overwrite theirs: it is empty."""
    try:
        environment = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return not environment or environment.get(_MARK) == record["mark"]


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, signal_number: int) -> None:
    try:
        process.send_signal(signal_number)
    except psutil.NoSuchProcess:
        return  # it ended by itself in the meantime, which is what was wanted
