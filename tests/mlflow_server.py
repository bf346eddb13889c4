"""A real MLflow server that a test starts, freezes and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests

from deploy.settings import HOST, free_port

_READY_S, _POLL_S = 120.0, 0.05


class MlflowServer:
    """A server on a free port, with its store in `folder`. It is not running at first."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.uri = f"http://{HOST}:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it is not running, and return when it answers."""
        if self._process is None:
            env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            with (self._folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=self._folder, env=env, stdout=log, stderr=log, start_new_session=True
                )
        eventually(self._answers, _READY_S)

    def freeze(self) -> None:
        """Stop all its processes: it accepts connections and does not answer."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End all its processes at once, if there are any."""
        if self._process is not None:
            self._send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text(encoding="utf-8")
        try:
            return bool(requests.get(f"{self.uri}/health", timeout=1).ok)
        except requests.RequestException:
            return False


def eventually(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as it is so. Fail if it is not in time."""
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, f"not so in {timeout_s:g} s"
        time.sleep(_POLL_S)
