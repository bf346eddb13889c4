"""What surrounds the workers of a run, on real Ray Train: room for them, and what their errors do to the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tests.integration.training.stack import TrainingStack
from trainer.data.prompt_files import load_prompts
from trainer.runtime.failures import EndAtMistakes, cause, mistakes_named
from trainer.runtime.resources import Asked, ClusterError, require_room
from trainer.runtime.waiting import waiting_told

pytestmark = pytest.mark.slow

ONE_CPU = Asked(1, {"CPU": 1.0})


class Other:
    """What holds most of the cluster."""

    def is_there(self) -> bool:
        return True


def fail(settings: dict[str, str]) -> None:
    """Meet a drive that fails to read at the first attempt, and lack of memory at the second."""
    folder = Path(settings["folder"])
    with (folder / "attempts").open("a", encoding="utf-8") as attempts:
        attempts.write("x")
    with mistakes_named("lower this"):
        if (folder / "attempts").stat().st_size == 1:
            load_prompts(folder / "prompts.txt", "prompt")
        torch.empty(10**15)


def test_a_run_says_what_it_waits_for_survives_a_passing_error_and_ends_at_lack_of_memory(
    stack: TrainingStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    (tmp_path / "prompts.txt").symlink_to("/proc/self/mem")  # each read of it ends in EIO
    other = ray.remote(Other).options(num_cpus=1.5).remote()
    assert ray.get(other.is_there.remote())
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            ray.kill(other)

    trainer = DataParallelTrainer(
        fail,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker=dict(ONE_CPU.each)),
        run_config=RunConfig(
            name="around",
            storage_path=str(tmp_path / "ray"),
            failure_config=FailureConfig(max_failures=9),
            callbacks=[EndAtMistakes("lower this")],
        ),
    )
    with waiting_told(ONE_CPU, tell, every_s=0.5), pytest.raises(TrainingFailedError) as caught:
        trainer.fit()
    assert 3 <= len(lines) <= 4  # none once there is room, nor while the workers start and work
    assert lines[0] == "waiting for 1 CPU: 0.5 of 2 free"
    assert (tmp_path / "attempts").read_text(encoding="utf-8") == "xx"
    text = r"worker 0 failed for good: out of memory: tried to allocate 3725290.30 GiB; the machine has .*: lower this"
    assert re.fullmatch(text, cause(caught.value))


def test_a_run_that_can_never_fit_is_refused_by_the_cluster_it_joined(stack: TrainingStack) -> None:
    with pytest.raises(ClusterError, match=r"asks for 3 CPUs .* has 2 on 1 node: lower engine.num_workers to 2"):
        require_room(Asked(3, {"CPU": 1.0}))
    with pytest.raises(ClusterError, match=r"1 GPU on one node, .* at most 0 GPUs"):
        require_room(Asked(1, {"CPU": 1.0, "GPU": 1.0}))
    require_room(Asked(2, {"CPU": 1.0}))
