from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from deploy.settings import ROOT

PROGRAM = """
import signal
from deploy.signals import end_as_interrupted

end_as_interrupted()
try:
    print("runs", flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("cleans up", flush=True)
    input()
    print("is clean", flush=True)
"""
IGNORING = """
import signal
from deploy.signals import end_as_interrupted

signal.signal(signal.SIGHUP, signal.SIG_IGN)
end_as_interrupted()
signal.raise_signal(signal.SIGHUP)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_once_and_the_next_leave_the_clean_up_alone(number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and a child inherits that")
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "runs\n"
        program.send_signal(number)
        assert program.stdout.readline() == "cleans up\n"
        for again in (signal.SIGTERM, signal.SIGHUP):
            program.send_signal(again)
        output, _ = program.communicate("\n", timeout=60)
    assert output == "is clean\n"
    assert program.returncode == 0


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    subprocess.run([sys.executable, "-c", IGNORING], cwd=ROOT, check=True, timeout=60)
