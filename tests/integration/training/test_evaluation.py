"""An evaluation on two workers, one of which is killed: it makes every chunk once and measures what one worker does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.training.stack import TrainingStack
from tests.tiny_flux import changed_copy
from trainer.jobs.evaluate import main

pytestmark = pytest.mark.slow
NUM_CHUNKS = 2 * 5  # of base and model: five prompts twice, in twos


def test_two_workers_of_which_one_is_killed_measure_what_one_worker_does(
    stack: TrainingStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: set[int] = set()

    def on_request(count: int, pid: int) -> None:
        pids.add(pid)
        if count == 4:
            os.kill(pid, signal.SIGKILL)

    spread, alone = (stack.write_run(name, num_workers=n) for name, n in (("spread", 2), ("alone_evaluated", 1)))
    for run_file in (spread, alone):
        changed_copy(stack.folder / "flux", stack.folder / "outputs" / run_file.stem / "latest" / "model")
    stack.observer.observe(on_request)
    output = stack.finish(spread, "trainer.jobs.evaluate")
    assert "drawn already" not in output
    assert len(pids) >= 3, "the killed worker has a successor"
    assert NUM_CHUNKS < stack.observer.count <= NUM_CHUNKS + 2, "only chunks that were not kept are measured again"
    stack.observer.observe(lambda count, pid: None)
    monkeypatch.chdir(stack.folder)
    assert main([alone.name]) == 0
    assert stack.observer.count == NUM_CHUNKS
    two, one = (numbers_of(stack.folder / "outputs" / run_file.stem) for run_file in (spread, alone))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-6)
    assert one["aligned base_pixel_distance difference low"] > 0


def numbers_of(run_folder: Path) -> dict[str, float]:
    numbers = json.loads((run_folder / "comparison" / "numbers.json").read_text(encoding="utf-8"))
    return {
        f"{policy} {name} {kind} {end}": value
        for policy, column in numbers.items()
        for name, number in column.items()
        for kind, ends in number.items()
        for end, value in ends.items()
    }
