"""Trainings that end in the middle and are taken up again: result and record are those of the undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch

from services.clients.checkpoint_store import CheckpointStore
from services.clients.run_folder import RunFolder
from services.commands.main import main
from tests.integration.training.stack import (
    NUM_STEPS,
    REQUESTS_BASE,
    REQUESTS_TWO_STEPS,
    TIMEOUT_S,
    Run,
    TrainingStack,
)

pytestmark = pytest.mark.slow

WEIGHTS_ATOL = 1e-5  # as in test_interrupted_run.py
IN_STEP_4 = REQUESTS_BASE + REQUESTS_TWO_STEPS + 8 + 2


def end_in_step_4(stack: TrainingStack, run_file: Path, end: Callable[[int], None]) -> str:
    """Train, and call `end` with the launcher's pid in step 4. Return what was printed until the launcher ended."""
    with stack.start(run_file) as process:
        stack.observer.observe(lambda count, _: end(process.pid) if count == IN_STEP_4 else None)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    stack.observer.observe(lambda count, pid: None)
    return output


def assert_same(run: Run, undisturbed: Run) -> None:
    """The record has each step once, and weights and numbers are those of the undisturbed run."""
    for metric in ("loss", "grad_norm", "steering_version", "guard/reward", "eval/reward"):
        steps = [step for step, _ in undisturbed.history(metric)]
        assert sorted(step for step, _ in run.history(metric)) == steps, metric
    assert run.last_values("loss") == pytest.approx(undisturbed.last_values("loss"), abs=1e-6)
    assert run.artifacts() >= {"evaluation.json", "before_after.png"}
    assert len(run.artifacts("images")) == len(undisturbed.artifacts("images"))
    assert run.record.info.status == "FINISHED"
    torch.testing.assert_close(run.weights(), undisturbed.weights(), rtol=0, atol=WEIGHTS_ATOL)


def test_a_run_whose_driver_died_goes_on_past_a_damaged_checkpoint(
    stack: TrainingStack, undisturbed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = stack.write_run("orphaned", zero_stage=2)
    end_in_step_4(stack, run_file, lambda pid: os.kill(pid, signal.SIGKILL))
    folder = RunFolder.find(stack.folder / "outputs", "orphaned").path
    newest = CheckpointStore(str(folder / "checkpoints")).manifests()[-1]
    assert newest.step == 2
    damaged = Path(newest.folder) / "policy_1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = stack.train(run_file, "--resume")
    assert f"checkpoint {newest.folder} is damaged: policy_1.safetensors has " in resumed.output
    assert "goes on from step 0 on 2 workers" in resumed.output
    assert resumed.folder == folder
    assert_same(resumed, undisturbed)
    outputs = f"output_dir={stack.folder / 'outputs'}"
    assert main(["checkpoints", str(run_file), "--set", outputs]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith(f"run {folder.name}: ")
    assert (listed[1].split()[0], listed[-1].split()[0]) == ("step", str(NUM_STEPS))


def test_a_stopped_run_goes_on_with_other_workers_and_is_prolonged(stack: TrainingStack, undisturbed: Run) -> None:
    run_file = stack.write_run("halted", zero_stage=2)
    output = end_in_step_4(stack, run_file, lambda pid: os.kill(pid, signal.SIGTERM))
    assert "SIGTERM: the run saves a checkpoint and stops" in output
    run = RunFolder.find(stack.folder / "outputs", "halted")
    assert f"step 4 of {NUM_STEPS} is saved; go on with: srpo run halted.yaml --resume {run.id}" in output
    layout = ["engine.num_workers=1", "engine.zero_stage=3", "engine.micro_batch=2"]
    resumed = stack.train(run_file, "--resume", run.id, *(part for key in layout for part in ("--set", key)))
    assert "changed: engine.num_workers 2 → 1" in resumed.output
    assert "goes on from step 4 on 1 workers" in resumed.output
    assert_same(resumed, undisturbed)
    refused = stack.start(run_file, "trainer.launch", "--resume")
    output, _ = refused.communicate(timeout=TIMEOUT_S)
    assert refused.returncode == 1
    assert f"run {run.id} has finished its {NUM_STEPS} steps: prolong it with --set num_steps=" in output
    stack.finish(run_file, "trainer.launch", "--resume", "--set", f"num_steps={NUM_STEPS + 2}")
    prolonged = stack.find("halted", "")
    assert [step for step, _ in prolonged.history("loss")] == list(range(1, NUM_STEPS + 3))


def test_a_run_without_mlflow_that_waits_in_vain_for_rewards_goes_on_later_and_loses_no_number(
    stack: TrainingStack, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The step that waits is dropped: what is saved is the state before it, although no checkpoint was due.

    `srpo sync` delivers the record at the end, here to another address.
    """
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sections = {
        "tracking": {"uri": "http://127.0.0.1:9"},  # the discard port: nothing answers
        "reward_service": {"url": stack.reward_url, "patience_minutes": 0.05},
    }
    run_file = stack.write_run("forsaken", sections=sections, zero_stage=2)

    def on_request(count: int, _: int) -> None:
        if count >= IN_STEP_4:
            raise RuntimeError("the service is away")

    stack.observer.observe(on_request)
    with stack.start(run_file) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    assert f"step 3 of {NUM_STEPS} is saved; go on with: srpo run forsaken.yaml --resume" in output
    stack.observer.observe(lambda count, pid: None)
    output = stack.finish(run_file, "trainer.launch", "--resume")
    assert "goes on from step 3 on 2 workers" in output
    folder = RunFolder.find(stack.folder / "outputs", "forsaken")
    assert f"`srpo sync {folder.path}` delivers them" in output
    assert folder.mlflow_run_id is None
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert main(["sync", str(folder.path), "--tracking-uri", uri]) == 0
    client = mlflow.MlflowClient(uri)
    assert_same(Run(folder.path, client, client.get_run(str(folder.mlflow_run_id)), output), undisturbed)
