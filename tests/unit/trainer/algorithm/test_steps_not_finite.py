"""What is not finite in a step, be it reward, loss, gradient or latent, is reported with step, worker and prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from services.config.run import RunConfig
from services.contract import RewardResponse
from tests.tiny_flux import MAX_SEQUENCE_LENGTH, PROMPTS
from tests.unit.trainer.algorithm.test_learner import BASELINES, STEP, make_run, score
from tests.workers import in_workers
from trainer.algorithm.step_metrics import StepMetrics, progress_line
from trainer.model.policy import Policy


def not_a_number(name: str, *request: Any) -> RewardResponse:
    response = score(name, *request)
    return replace(response, rewards=response.rewards * math.nan)


def far_below_zero(name: str, *request: Any) -> RewardResponse:
    """Return rewards that are finite, but whose sum is not."""
    response = score(name, *request)
    return replace(response, rewards=np.full_like(response.rewards, -3e38))


def steep(name: str, *request: Any) -> RewardResponse:
    response = score(name, *request)
    assert isinstance(response.image_gradient, np.ndarray)
    return replace(response, image_gradient=np.full_like(response.image_gradient, 1e38))


def break_steps(rank: int, runs: Sequence[RunConfig], too_wide: RunConfig) -> None:
    from trainer.model.engine import init_distributed

    init_distributed(use_gpu=False)
    refuse_delta_sigma(too_wide)
    for run in runs:
        break_step(rank, run)


def break_step(rank: int, run: RunConfig) -> None:
    """Check that each non-finite reward, loss, gradient and latent is reported with its step."""
    from trainer.algorithm.learner import StepError
    from trainer.algorithm.methods import make_learner, num_backwards
    from trainer.model.engine import Engine

    optimizer = run.optimizer.model_copy(update={"max_skipped_updates": 2})
    run = run.model_copy(update={"optimizer": optimizer})
    flux = Policy.load(run.model.path, torch.float32)
    engine = Engine.create(
        flux.transformer, run.optimizer, run.engine, num_backwards(run, dist.get_world_size()), torch.float32
    )
    encode = partial(flux.encode_prompts, max_sequence_length=MAX_SEQUENCE_LENGTH)

    def make(reward: Any) -> Any:
        return make_learner(run, engine, flux, reward, encode)

    where, branch = rf"^step 4, worker {rank}, prompts '[^']+'", "branch denoise"
    if run.method.kind == "direct_align":
        found, loss = f"{where}, {branch}", f"the loss of {branch}"
        check_limit(make)
    else:
        found, loss = where, "the loss"
    with pytest.raises(StepError, match=rf"{found}: reward \('tiny',\) answered non-finite numbers"):
        take_step(make(not_a_number))
    skipped = r"^step 4: the gradient's norm over all workers is (inf|nan); the update is skipped$"
    wrong = [far_below_zero] if run.method.kind == "grpo" else [far_below_zero, steep]  # GRPO requests no gradient
    for reward in wrong:
        before = {name: weight.clone() for name, weight in flux.transformer.state_dict().items()}
        numbers, printed = take_step(make(reward))
        assert bool(re.match(f"{where}: {loss} is not finite\n", printed)) == (reward is far_below_zero)
        assert re.search(skipped, printed, re.MULTILINE)
        assert numbers["skipped_updates"] == 1
        assert "update skipped" in progress_line(4, 4, numbers | {"seconds_step": 1.0})
        assert all(before[name].equal(weight) for name, weight in flux.transformer.state_dict().items())
    for parameter in flux.transformer.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    with pytest.raises(StepError, match=rf"{where}: a (clean|late) latent is not finite"):
        take_step(make(score))


def take_step(learner: Any) -> tuple[dict[str, float], str]:
    """Return the step's metrics and what it printed."""
    with redirect_stdout(StringIO()) as printed:
        for materials in learner.roll_out(STEP):
            for material in materials:
                learner.learn(material)
            learner.update()
    numbers = learner.metrics.mean_over_workers(torch.device("cpu"))
    learner.metrics = StepMetrics()
    return numbers, printed.getvalue()


def check_limit(make: Any) -> None:
    """Check that skipped updates end a run if there are too many in a row, and not if there is a good one between."""
    from trainer.algorithm.learner import StepError

    rewards = iter([far_below_zero, far_below_zero, score, far_below_zero, far_below_zero, far_below_zero])
    reward: list[Any] = []
    learner = make(lambda *request: reward[-1](*request))  # of which two may be skipped
    for expected in (1, 1, 0, 1, 1):
        reward.append(next(rewards))
        numbers, _ = take_step(learner)
        assert numbers["skipped_updates"] == expected
        assert ("grad_norm" in numbers) == (expected == 0)
    reward.append(next(rewards))
    with pytest.raises(StepError, match=r"^step 4: .* 3 updates in a row .* optimizer.max_skipped_updates is 2$"):
        take_step(learner)


def refuse_delta_sigma(run: RunConfig) -> None:
    """Check that the learner refuses a Δσ that is too large under a dynamic shift, which only the model knows."""
    from trainer.algorithm.methods import make_learner

    flux = Policy.load(run.model.path, torch.float32)
    with pytest.raises(ValueError, match=r"objective\.delta_sigma 0\.5 is larger than the range of sigma, \[0\."):
        make_learner(run, SimpleNamespace(transformer=flux.transformer), flux, score, None)  # type: ignore[arg-type]


@pytest.fixture
def folder(flux_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "flux").symlink_to(flux_folder)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return tmp_path


def test_every_method_reports_what_is_not_finite_with_its_step(folder: Path) -> None:
    """The same worker also tries a Δσ that is too large under a dynamic shift: a worker takes long to start."""
    run = make_run(folder, "default", 1, 1, 0)
    objective = run.objective.model_copy(update={"delta_sigma": 0.5})
    rollout = run.rollout.model_copy(update={"shift": "dynamic"})
    too_wide = run.model_copy(update={"objective": objective, "rollout": rollout})
    in_workers(1, break_steps, [make_run(folder, name, 1, 1, 0) for name in ("everything", *BASELINES)], too_wide)
