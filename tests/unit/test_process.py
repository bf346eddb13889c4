from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.process import OwnedProcess

WAIT_FOR_SIGNAL = "import signal; signal.pause()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAIT_FOR_SIGNAL!r}])
print(child.pid, file=open("child", "w"), flush=True)
open("is_ready", "w")
child.wait()
"""


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[OwnedProcess]:
    owned = OwnedProcess("parent", tmp_path)
    os.mkfifo(tmp_path / "is_ready")
    owned.start([sys.executable, "-c", PARENT], tmp_path, {})
    (tmp_path / "is_ready").read_bytes()  # returns once the parent has opened its end
    yield owned
    owned.stop()


@pytest.fixture
def stranger() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", WAIT_FOR_SIGNAL], start_new_session=True) as process:
        yield psutil.Process(process.pid)
        process.kill()


def leader_and_child(folder: Path) -> tuple[psutil.Process, psutil.Process]:
    record = json.loads((folder / "parent.json").read_text())
    return psutil.Process(record["pid"]), psutil.Process(int((folder / "child").read_text()))


def is_alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def test_another_program_finds_and_stops_it_with_its_descendants(owned: OwnedProcess, tmp_path: Path) -> None:
    leader, child = leader_and_child(tmp_path)
    found = OwnedProcess("parent", tmp_path)
    assert found.is_running()
    assert found.stop()
    assert not is_alive(leader)
    assert not is_alive(child)
    assert not found.is_running()
    assert not found.stop()


def test_orphans_of_a_killed_leader_are_stopped(owned: OwnedProcess, tmp_path: Path) -> None:
    leader, child = leader_and_child(tmp_path)
    leader.kill()
    os.waitpid(leader.pid, 0)
    assert not owned.is_running()
    assert is_alive(child)
    assert owned.stop()
    assert not is_alive(child)


def test_a_process_that_merely_has_the_pid_is_left_alone(stranger: psutil.Process, tmp_path: Path) -> None:
    record = {"pid": stranger.pid, "started": stranger.create_time() - 100, "notes": {}}
    (tmp_path / "parent.json").write_text(json.dumps(record))
    owned = OwnedProcess("parent", tmp_path)
    assert not owned.is_running()
    assert not owned.stop()
    assert is_alive(stranger)
