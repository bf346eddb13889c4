from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from deploy.mlflow_database import ensure_database
from deploy.settings import ROOT, LocalError

MAKE = "import pathlib, sys, deploy.mlflow_database as made; made.ensure_database(pathlib.Path(sys.argv[1]))"
SIZES = (0, 1, 500_000)  # bytes of the draft: before SQLite writes, at its first tables, amid the migrations of 950 kB


def kill_at(size: int, file: Path) -> None:
    """Begin to make the database, and kill all that takes part once its draft has this size."""
    old = set(file.parent.glob("*.draft"))
    command = [sys.executable, "-c", MAKE, str(file)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        while not any(draft.stat().st_size >= size for draft in set(file.parent.glob("*.draft")) - old):
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)


def test_a_first_start_that_is_killed_at_any_moment_can_be_repeated(tmp_path: Path) -> None:
    file = tmp_path / "mlflow" / "mlflow.db"
    for size in SIZES:
        kill_at(size, file)
        assert not file.exists()
    ensure_database(file)
    assert list(file.parent.iterdir()) == [file]
    client = mlflow.MlflowClient(f"sqlite:///{file}")
    run = client.create_run(client.create_experiment("after"))
    before = file.stat()
    ensure_database(file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_a_database_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "mlflow.py").write_text("raise SystemExit('no room left')", encoding="utf-8")
    with pytest.raises(LocalError, match=r"cannot make its database .*mlflow\.db: no room left"):
        ensure_database(tmp_path / "mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
