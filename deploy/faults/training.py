"""One training under test: start it, follow what it prints, find its processes, and take it up again.

training = Training(stage, "killed worker", {"num_steps": 8})
training.start()
training.wait_for_step(5)             # step 5 is under way
os.kill(training.workers()[0].pid, signal.SIGKILL)
training.wait()
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from deploy.bench_method.plan import merged
from deploy.settings import ROOT
from services.clients.run_folder import RunFolder
from services.config.run import RunConfig, load_run_config

if TYPE_CHECKING:
    from deploy.faults.stage import Stage

RUN_FILE = ROOT / "deploy" / "faults" / "run.yaml"
_WORKER_TITLE = "RayTrainWorker"  # in the title that Ray gives a worker's process
_TIMEOUT_S = 300.0
_PID = re.compile(r"pid=(\d+)")
_STEP = re.compile(r"step (\d+)/\d+ ")


class FaultError(RuntimeError):
    """A training did not do what the matrix waits for; the text says what it printed last."""


class Training:
    """A run, from its first launch over all that take it up."""

    def __init__(self, stage: Stage, name: str, changes: Mapping[str, Any] | None = None) -> None:
        self.stage, self.lines = stage, list[str]()
        tree = merged(yaml.safe_load(RUN_FILE.read_text(encoding="utf-8")), stage.addresses())
        tree = merged(tree, {"name": re.sub(r"\W+", "_", name), "output_dir": str(stage.folder / "outputs")})
        self.run_file = stage.folder / f"{tree['name']}.yaml"
        self.run_file.write_text(yaml.safe_dump(merged(tree, dict(changes or {}))), encoding="utf-8")
        self.config: RunConfig = load_run_config(self.run_file)
        self.exit_codes: list[int] = []
        self.seconds = 0.0
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._began = 0.0

    @property
    def folder(self) -> RunFolder:
        return RunFolder.find(self.config.output_dir, self.config.name)

    @property
    def launcher(self) -> psutil.Process:
        """The process that `start` has started last."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def start(self, *arguments: str) -> None:
        """Launch it, or take it up with "--resume"."""
        command = [sys.executable, "-m", "trainer.launch", str(self.run_file), *arguments]
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | self.stage.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def wait(self, timeout_s: float = _TIMEOUT_S) -> int:
        """Wait until the launcher has ended. Return its exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise FaultError(f"not over after {timeout_s:g} s; {self.last_words()}") from error
        self.seconds += time.monotonic() - self._began
        self.exit_codes.append(code)
        return code

    def finish(self) -> None:
        """Wait for the end, which must be a success."""
        if self.wait() != 0:
            raise FaultError(f"exit code {self.exit_codes[-1]}; {self.last_words()}")

    def take_up(self) -> None:
        """Go on with the training, to its end."""
        self.start("--resume")
        self.finish()

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self._process is not None and self._process.poll() is not None

    def stop_if_running(self) -> None:
        """Kill what is left of it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` is under way: the one before is done. Step 1 begins after the base model's evaluation."""
        self.wait_for_line(lambda line: _step_in(line) == step - 1 if step > 1 else line.startswith("base:"))

    def wait_for_line(self, is_wanted: Callable[[str], bool], timeout_s: float = _TIMEOUT_S, after: int = 0) -> str:
        """Wait for a line, from number `after` on, and return it."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self.lines[after:]:
                    if is_wanted(_unprefixed(line)):
                        return line
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self.is_over:
                    raise FaultError(f"the line did not come; {self.last_words()}")
                self._changed.wait(min(left_s, 5))

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the workers, which are descendants of our own raylets."""
        found = []
        for process in self.stage.processes():
            try:
                if any(_WORKER_TITLE in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def steps_printed(self) -> list[int]:
        """Return the steps in the order in which they were done, repeated ones more than once.

        Two nodes on one machine share a folder of logs, and Ray prints each line of it for each of them. A process does
        no step twice.
        """
        found = [(_pid_in(line), _step_in(_unprefixed(line))) for line in self.lines]
        return [step for _, step in dict.fromkeys(found) if step is not None]

    def last_words(self) -> str:
        return "it printed last:\n" + "".join(self.lines[-15:])

    def said(self, parts: Sequence[str]) -> list[str]:
        """Return the lines that hold one of the parts, each text once."""
        lines = [_unprefixed(line).strip() for line in self.lines]
        return list(dict.fromkeys(line for line in lines if any(part in line for part in parts)))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with (self.stage.folder / "logs" / f"{self.config.name}.log").open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()


def _unprefixed(line: str) -> str:
    """Return a line without Ray's "(RayTrainWorker pid=123) "."""
    return re.sub(r"^(\x1b\[\d+m)*\([^)]*pid=[^)]*\)(\x1b\[0m)? ", "", line)


def _pid_in(line: str) -> str:
    found = _PID.search(line)
    return found[1] if found else ""


def _step_in(line: str) -> int | None:
    found = _STEP.match(line)
    return int(found[1]) if found else None


def kill(process: psutil.Process) -> None:
    """Kill a process, unless it has ended."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def until(is_so: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait for the moment of a fault. Raise FaultError if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise FaultError("the moment for the fault did not come")
        time.sleep(0.01)
