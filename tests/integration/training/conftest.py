"""Start Ray, the reward service and MLflow once for all trainings, and train the run that others are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import ray
import torch

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from tests.integration.training.stack import HELD_OUT, RequestObserver, Run, TrainingStack
from tests.serving import reward_app, serve_app
from tests.tiny_flux import PROMPTS, make_tiny_flux
from tests.tiny_judges import make_tiny_judges
from tests.tiny_models import make_tiny_clip


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingStack]:
    folder = tmp_path_factory.mktemp("training")
    make_tiny_flux(folder / "flux")
    make_tiny_clip(folder / "clip")
    real = torch.randint(0, 256, (len(PROMPTS), 3, 16, 16), dtype=torch.uint8)
    make_tiny_judges(folder / "judge", ("3D", "Flat"), PROMPTS, real)
    (folder / "train.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n".join(HELD_OUT), encoding="utf-8")
    clip = ClipArgs(kind="clip", path=str(folder / "clip"))
    observer = RequestObserver(reward_app(Worker({"tiny": clip}, WorkerArgs())))
    # Ray puts sockets into its folder, and a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder, serve_app(observer) as url:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=ray_folder, log_to_driver=False)
        try:
            yield TrainingStack(folder, ray.get_runtime_context().gcs_address, url, observer)
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def stop_observing(stack: TrainingStack) -> Iterator[None]:
    """Let no test's observer see the next test's requests."""
    yield
    stack.observer.observe(lambda count, pid: None)


@pytest.fixture(scope="package")
def undisturbed(stack: TrainingStack) -> Run:
    """Return a run that nothing interrupts, on two workers with ZeRO stage 2."""
    return stack.train(stack.write_run("undisturbed", zero_stage=2))
