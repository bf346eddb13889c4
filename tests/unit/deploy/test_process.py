from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.process import OwnedProcess
from deploy.settings import LocalError

WAIT_FOR_SIGNAL = "import signal; signal.pause()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAIT_FOR_SIGNAL!r}])
print(child.pid, file=open("child", "w"), flush=True)
open("is_ready", "w")
child.wait()
"""


LEAVER = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {WAIT_FOR_SIGNAL!r}], stdout=subprocess.DEVNULL).pid)
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


def test_the_session_of_a_stranger_is_left_alone_when_its_leader_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        child = psutil.Process(int(leader.communicate()[0]))
    record = {"pid": leader.pid, "started": time.time() - 1, "notes": {}}
    (tmp_path / "parent.json").write_text(json.dumps(record))
    try:
        assert os.getsid(child.pid) == leader.pid
        assert not OwnedProcess("parent", tmp_path).stop()
        assert is_alive(child)
    finally:
        child.kill()


def test_after_a_reboot_no_session_is_ours(owned: OwnedProcess, tmp_path: Path) -> None:
    leader, child = leader_and_child(tmp_path)
    leader.kill()
    os.waitpid(leader.pid, 0)
    record = json.loads((tmp_path / "parent.json").read_text()) | {"started": psutil.boot_time() - 100}
    (tmp_path / "parent.json").write_text(json.dumps(record))
    try:
        assert not owned.stop()
        assert is_alive(child)
    finally:
        child.kill()


@pytest.mark.parametrize("text", ['{"pid": 12', "[]", '{"pid": 12}'])
def test_a_record_that_cannot_be_read_is_named_with_the_cure(text: str, tmp_path: Path) -> None:
    (tmp_path / "parent.json").write_text(text)
    with pytest.raises(LocalError, match=r"parent\.json .*parent.* delete the file"):
        OwnedProcess("parent", tmp_path).stop()


def test_a_variable_can_be_taken_out_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SRPO_TEST_KEPT", "SRPO_TEST_TAKEN"):
        monkeypatch.setenv(name, "1")
    owned = OwnedProcess("parent", tmp_path)
    show = "import os; print(*sorted(name for name in os.environ if name.startswith('SRPO_TEST')))"
    owned.start([sys.executable, "-c", show], tmp_path, {"SRPO_TEST_TAKEN": None, "SRPO_TEST_GIVEN": "1"})
    os.waitpid(json.loads((tmp_path / "parent.json").read_text())["pid"], 0)
    assert owned.last_lines() == "SRPO_TEST_GIVEN SRPO_TEST_KEPT"
