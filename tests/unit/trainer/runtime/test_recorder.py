"""A step's metrics are means over all that was added, and the recorder loses neither records nor errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from services.clients.tracking import Tracker
from trainer.algorithm.step_metrics import StepMetrics, progress_line
from trainer.runtime.recorder import Recorder


@pytest.fixture
def lone_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker.start(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}", "test", "run")


@pytest.mark.usefixtures("lone_worker")
def test_metrics_are_means_and_seconds_are_sums() -> None:
    metrics = StepMetrics()
    metrics.add("reward", torch.tensor([1.0, 2.0]))
    metrics.add("reward", 6.0)
    metrics.add_seconds("reward", 0.25)
    metrics.add_seconds("reward", 0.5)
    with metrics.timed("update"):
        pass
    means = metrics.mean_over_workers(torch.device("cpu"))
    assert means.pop("seconds_update") >= 0
    assert means == {"reward": 3.0, "seconds_reward": 0.75}


def test_the_recorder_writes_everything_in_order(tracker: Tracker) -> None:
    recorder = Recorder(tracker)
    for step in range(1, 6):
        recorder.log(partial(Tracker.log_metrics, metrics={"loss": 1 / step}, step=step))
    recorder.close()
    history = mlflow.MlflowClient(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 6)]


def test_the_recorder_raises_an_error_at_the_next_record(tracker: Tracker) -> None:
    recorder = Recorder(tracker)
    recorder.log(partial(Tracker.log_file, path=Path("nowhere")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recorder.log(partial(Tracker.log_metrics, metrics={"loss": 1.0}, step=1))


def test_the_progress_line_says_how_long_the_rest_takes() -> None:
    numbers = {"reward_denoise": 0.05, "loss": 0.65, "grad_norm": 0.4, "seconds_step": 1.5}
    line = progress_line(12, 60, numbers)
    assert line == "step 12/60  reward 0.0500  loss 0.6500  gradient norm 0.400  1.50 s/step  ETA 1:12"
