"""Say how long MLflow's client waits for a server. It reads its settings from the environment at each call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Defaults: the environment may ask for more patience with a slow server.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds that a server may stay silent: the training may keep all cores busy
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the callers print the address themselves
}
_SLOWEST_STORE = 4 * 2**20  # bytes a second at which a server puts away what it was sent, silent meanwhile


def be_patient() -> None:
    """Give every setting that the environment does not give."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Replace one setting for the calls in this context, and for those of other threads meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def upload_timeout_s(path: Path) -> str:
    """Return the seconds that a server may stay silent about a file of this size, the usual ones at least."""
    usual_s = int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
    return str(usual_s + path.stat().st_size // _SLOWEST_STORE)
