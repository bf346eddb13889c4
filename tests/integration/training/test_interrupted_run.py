"""Trainings that lose a worker, break a rule, are steered or stopped: they resume, end and report as they should.

A run that loses a worker must be the same training as the undisturbed one. A run that its guard ends must equal the
undisturbed one's beginning.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import psutil
import pytest
import torch

from services.commands.main import main
from services.config.steering import ERROR_TAG, TAG
from tests.integration.training.stack import (
    NUM_STEPS,
    REQUESTS_BASE,
    REQUESTS_TWO_STEPS,
    TIMEOUT_S,
    Run,
    TrainingStack,
    changed,
)
from tests.tiny_flux import PROMPTS

pytestmark = pytest.mark.slow

# Which callers' images share a forward of the reward is random, so a gradient's last bits are too. 2 steps move 2e-3.
WEIGHTS_ATOL = 1e-5
# A color that such bits round the other way moves a distance by up to this; two steps move it by 4e-2.
GUARD_RTOL = 2e-3


def test_a_killed_worker_costs_steps_but_changes_nothing(stack: TrainingStack, undisturbed: Run) -> None:
    """A tag that cannot be understood changes nothing either."""

    def on_request(count: int, pid: int) -> None:
        if count == REQUESTS_BASE + 1:
            stack.set_tag("killed", TAG, '{"positive": ""}')
        elif count == REQUESTS_BASE + 2 * REQUESTS_TWO_STEPS + 3:  # in step 5
            os.kill(pid, signal.SIGKILL)

    stack.observer.observe(on_request)
    killed = stack.train(stack.write_run("killed", zero_stage=2))
    assert [step for step, _ in killed.history("loss")] == list(range(1, NUM_STEPS + 1)), "each step once"
    assert "goes on from step 4 on 2 workers" in killed.output
    assert [step for step, _ in killed.history("eval/reward")] == [0, NUM_STEPS]
    assert killed.last_values("loss") == pytest.approx(undisturbed.last_values("loss"), abs=1e-6)
    torch.testing.assert_close(killed.weights(), undisturbed.weights(), rtol=0, atol=WEIGHTS_ATOL)
    assert killed.last_values("steering_version") == [0] * NUM_STEPS
    assert "positive: " in killed.record.data.tags[ERROR_TAG]


def test_a_rule_ends_a_run_and_the_best_checkpoint_is_exported(stack: TrainingStack, undisturbed: Run) -> None:
    """The rule is first broken at step 4, after a worker was killed in step 4: earlier checks are not lost.

    Nor is the steering lost. It sets the words of the run file, which leaves the training the same.
    """
    rule = rule_broken_first_at(undisturbed, step=4)

    def on_request(count: int, pid: int) -> None:
        begun = count - REQUESTS_BASE - REQUESTS_TWO_STEPS
        if begun == 1:  # in step 3
            stack.set_tag("guarded", TAG, '{"positive": "3D", "negative": "Flat"}')
        # After the request that checks the words, this is the fifth of step 4. A worker sends four, so both have begun
        # the step, and step 3 is recorded.
        elif begun == 8 + 1 + 5:
            os.kill(pid, signal.SIGKILL)

    stack.observer.observe(on_request)
    guarded = stack.train(stack.write_run("guarded", [rule], zero_stage=2))
    losses = [step for step, _ in guarded.history("loss")]
    assert losses == [1, 2, 3, 4], "each step once"
    assert "goes on from step 2 on 2 workers" in guarded.output
    assert guarded.history("steering_version") == [(1, 0), (2, 0), (3, 0), (4, 1)], "step 3 is repeated as it was"
    expected = dict(undisturbed.history(rule["metric"])[:3])
    assert dict(guarded.history(rule["metric"])) == pytest.approx(expected, rel=GUARD_RTOL)
    assert guarded.record.info.status == "FINISHED"
    assert guarded.record.data.tags["exported_step"] == "2"
    assert guarded.record.data.tags["stopped_by"] in guarded.output
    assert rule["metric"] in guarded.record.data.tags["stopped_by"]
    summary = json.loads((guarded.folder / "evaluation.json").read_text())
    assert summary["guard"]["exported_step"] == 2
    torch.testing.assert_close(guarded.weights(), undisturbed.weights_at(2), rtol=0, atol=WEIGHTS_ATOL)


def rule_broken_first_at(run: Run, step: int) -> dict[str, Any]:
    """Return a rule on a number of the guard in `run`: its bound lies between the value at `step` and all before."""
    for metric in ("guard/reward", "guard/common_mode", "guard/frechet_3D", "guard/frechet_Flat"):
        values = dict(run.history(metric))
        before = [value for earlier, value in values.items() if earlier < step]
        beyond = 4 * GUARD_RTOL * abs(values[step])  # a last bit must not decide
        if values[step] > max(before) + beyond:
            return {"metric": metric, "above": (values[step] + max(before)) / 2}
        if values[step] < min(before) - beyond:
            return {"metric": metric, "below": (values[step] + min(before)) / 2}
    raise AssertionError("no number of the guard leaves its range at this step")


def test_a_rule_that_the_base_model_breaks_ends_the_run_at_its_first_check(stack: TrainingStack) -> None:
    """A worker finds a mistake of the run file: it is reported in one line, and no worker is started again."""
    pids = set()
    stack.observer.observe(lambda _, pid: pids.add(pid))
    sections = {"finetune": {"kind": "lora", "rank": 2}, "ema": {"decay": 0.5}}
    rule = {"metric": "guard/saturation", "above": -1.0}
    with stack.start(stack.write_run("mistaken", [rule], sections)) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "guard.stop_when.0: the base model is beyond it: guard/saturation" in line
    assert len(pids) == 3, "the launcher, and each worker once"
    record = stack.find("mistaken", output).record
    assert record.info.status == "FAILED"
    assert 0 < int(record.data.tags["num_trained_parameters"]) < 5000, "the adapter's alone"


def test_a_run_is_steered_at_a_step_on_all_workers_and_when_stopped_leaves_none(stack: TrainingStack) -> None:
    """The run also warns that its encoder is too short for its prompts."""
    base, steered = {"3D", "Flat"}, {"Oil", "Photo"}
    first_of_step = {step: REQUESTS_BASE + 1 + after for step, after in {1: 0, 2: 8 + 1, 4: 8 + 1 + 8 + 2 + 8}.items()}
    stopped = steer_and_stop(stack, first_of_step)
    assert stopped.record.info.status == "KILLED"
    warning = stopped.record.data.tags["warning_long_prompts"]
    assert f"of {len(PROMPTS)} prompts have more than 3 T5 tokens (model.max_sequence_length)" in warning
    assert stopped.output.count(f"warning: {warning}") == 1
    # The guard's checks, two requests after every second step, keep the words of the run file.
    expected = [base] * (REQUESTS_BASE + 8) + [steered] * (1 + 8) + [base] * 2 + [steered] * 8
    assert [words for _, words in stack.observer.requests[: len(expected)]] == expected
    step_2 = stack.observer.requests[first_of_step[2] - 1 :][:8]
    assert len({pid for pid, _ in step_2}) == 2
    assert stopped.history("steering_version")[:3] == [(1, 0), (2, 1), (3, 1)]
    assert "no reward 'nobody'" in stopped.record.data.tags[ERROR_TAG]
    assert "steered to version 1: Oil | Photo" in stopped.output


def steer_and_stop(stack: TrainingStack, first_of_step: dict[int, int]) -> Run:
    """Steer a run in step 1, set a wrong tag in step 2, terminate it in step 4. Fail if a process is left."""
    in_step_4 = threading.Event()

    def on_request(count: int, _: int) -> None:
        if count == first_of_step[1]:
            words = ["--positive", "Oil", "--negative", "Photo"]
            assert main(["steer", "stopped", *words, "--tracking-uri", stack.tracking_uri]) == 0
        elif count == first_of_step[2]:
            stack.set_tag("stopped", TAG, '{"weights": {"nobody": 1}}')
        elif count == first_of_step[4]:
            in_step_4.set()

    stack.observer.observe(on_request)
    run_file = changed(stack.write_run("stopped"), "model", max_sequence_length=3)
    with stack.start(run_file) as process:
        assert in_step_4.wait(TIMEOUT_S)
        running = [psutil.Process(pid) for pid in {pid for pid, _ in stack.observer.requests}]
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    stopped = stack.find("stopped", output)
    _, alive = psutil.wait_procs(running, timeout=30)
    assert not alive
    return stopped
