"""A process that hangs says where and ends; one that beats, or does long work without beats, goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import threading
from trainer.runtime.heartbeat import Heartbeat
heartbeat = Heartbeat(minutes=0.2 / 60)

def wait(seconds):
    threading.Event().wait(seconds)

def hang():
    wait(20)

{body}
print("goes on")
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


def test_a_hang_is_shown_and_ends_the_process() -> None:
    ended = run("heartbeat.beat()\nhang()")
    assert ended.returncode == 1
    assert "in hang" in ended.stderr
    assert "goes on" not in ended.stdout


@pytest.mark.parametrize(
    "body",
    [
        "wait(0.5)",
        "for _ in range(5): heartbeat.beat(); wait(0.05)",
        "heartbeat.beat()\nwith heartbeat.paused():\n    heartbeat.beat(); wait(0.5)\nheartbeat.stop()",
        "heartbeat.beat(); heartbeat.stop(); wait(0.5)",
    ],
    ids=["before the first beat", "beating", "paused", "stopped"],
)
def test_what_does_not_hang_goes_on(body: str) -> None:
    ended = run(body)
    assert (ended.returncode, ended.stdout) == (0, "goes on\n"), ended.stderr


def test_the_limit_begins_anew_after_a_pause() -> None:
    ended = run("with heartbeat.paused():\n    wait(0.3)\nhang()")
    assert (ended.returncode, ended.stdout) == (1, "")
