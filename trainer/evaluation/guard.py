"""Check a running training: at fixed steps measure its images, keep the numbers, and say whether the run must end.

Each worker measures what it draws (shared_measurer.py). Every worker keeps the numbers that the stop rules name, so all
decide alike (stop_rules.py) and nobody waits for a worker that has stopped. The checkpoints contain these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from services.clients.reward import RewardClient
from services.config.evaluation import GuardConfig
from services.config.run import RunConfig
from trainer.algorithm.rollout import Sampling
from trainer.data.run_prompts import located_guard_prompts
from trainer.draws import guard_generator
from trainer.evaluation.drawing import Draw, PictureSet
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurements, Measurer, metric_names
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.shared_measurer import SharedMeasurer
from trainer.evaluation.similarities import measures_of, reward_metrics
from trainer.evaluation.stop_rules import Check, best_check, broken_rule, exported_check, require_sound_base

_BASE_IMAGES_FILE = "guard_base.safetensors"


class Guard:
    """The guard of a run, with the checks made so far. `settings` is the run's guard section, `folder` the run's."""

    def __init__(
        self,
        config: RunConfig,
        settings: GuardConfig,
        pictures: PictureSet,
        measurer: Measurer,
        device: torch.device,
        folder: Path,
    ) -> None:
        self._settings, self._num_steps = settings, config.num_steps
        self._wanted_distance = _distance_to_positive(config)
        self._device, self._base_path = device, folder / _BASE_IMAGES_FILE
        self._measurer = SharedMeasurer(pictures, measurer, self._base_path)
        self._checks: list[Check] = []
        self.pictures = pictures

    def is_due(self, step: int) -> bool:
        """Return whether a check is due after `step` optimizer steps and has not been made."""
        is_wanted = step % self._settings.every_num_steps == 0 or step == self._num_steps
        return is_wanted and all(check.step != step for check in self._checks)

    def check(self, step: int, draw: Draw) -> dict[str, float]:
        """Draw and measure the guard's images, keep the numbers that the rules name. Return all numbers, on worker 0.

        All workers call this together; the images of step 0 are the base model's. Raises ValueError for a number that
        is not finite, and at step 0 for a rule that the base model already breaks.
        """
        measurements = self._measurer.measure(draw, of_base=step == 0)
        numbers = {} if measurements is None else self._numbers(measurements)
        if step == 0 and measurements is not None:
            self._base_path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"images": measurements.images}, self._base_path)
        names = sorted(set(self._settings.metrics.values()))
        values = torch.tensor([numbers.get(name, math.nan) for name in names], dtype=torch.float64, device=self._device)
        dist.broadcast(values, src=0)
        kept = dict(zip(names, values.tolist(), strict=True))
        if wrong := {name: value for name, value in kept.items() if not math.isfinite(value)}:
            raise ValueError(f"step {step}: the guard cannot decide on numbers that are not finite: {wrong}")
        self._checks.append(Check(step, kept))
        require_sound_base(self._settings, self._checks[0])
        return numbers

    @property
    def broken_rule(self) -> str | None:
        """Return why the run must end now, with the numbers, or None while it may go on."""
        return broken_rule(self._settings, self._checks)

    @property
    def last_step(self) -> int:
        """Return the step of the last check."""
        return self._checks[-1].step

    @property
    def exported_step(self) -> int:
        """Return the step whose weights the run exports if it ends at the last check."""
        return exported_check(self._settings, self._checks).step

    @property
    def best_step(self) -> int | None:
        """Return the step of the best check so far; None before the first one."""
        return best_check(self._settings, self._checks).step if self._checks else None

    def is_best(self, step: int) -> bool:
        """Return whether the last check was made at `step` and is the best so far, so that its weights must be kept."""
        return bool(self._checks) and self.last_step == step == self.best_step

    def state(self) -> list[dict[str, Any]]:
        """Return the checks so far, as a checkpoint keeps them."""
        return [asdict(check) for check in self._checks]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take the checks that `state` returned."""
        self._checks = [Check(**check) for check in state]

    def _numbers(self, measurements: Measurements) -> dict[str, float]:
        numbers = self._measurer.summarize(measurements)
        if (distance := numbers.get(self._wanted_distance)) is not None:
            numbers["frechet_wanted"] = distance
        return {f"guard/{name}": number for name, number in numbers.items()}


def guard_prompts(config: RunConfig, settings: GuardConfig) -> tuple[str, ...]:
    """Return the prompts of every check. Raise PromptsError if there are fewer than guard.num_prompts."""
    return tuple(each.prompt for each in located_guard_prompts(config, settings))


def guard_pictures(config: RunConfig, settings: GuardConfig, sampling: Sampling) -> PictureSet:
    """Return the images of every check. Raise PromptsError as guard_prompts does."""
    num_each = settings.num_images_per_prompt
    prompts = tuple(prompt for prompt in guard_prompts(config, settings) for _ in range(num_each))
    return PictureSet(prompts, config.seed, config.evaluation.batch, sampling, guard_generator)


def guard_measurer(
    config: RunConfig, settings: GuardConfig, client: RewardClient, judges: Judges | None, prompts: Collection[str]
) -> Measurer:
    """Return what measures the images of the checks, by the rewards of `client`'s service, judges and real pictures.

    prompts: those of which this worker measures images.
    """
    rewards = measures_of(client, config, reward_metrics(config, settings.held_out_reward))
    truth = truth_of(config, prompts)
    evaluation, repeats = config.evaluation, settings.num_images_per_prompt
    return Measurer(rewards, judges, evaluation.reference_path, repeats, truth, evaluation.batch)


def check_guard(config: RunConfig, settings: GuardConfig, offered: Collection[str]) -> None:
    """Raise ValueError, before anything starts, if the guard cannot work as the run file sets it.

    `offered`: the rewards that the service has. Raises PromptsError if there are too few prompts, and DatasetError if
    evaluation.truth lacks one of them.
    """
    prompts, judges, held_out = guard_prompts(config, settings), config.evaluation.judge_path, settings.held_out_reward
    if judges and (unknown := sorted(set(prompts) - set(Judges.subjects(judges)))):
        raise ValueError(f"evaluation.judge_path knows no subject {unknown[0]!r} of the guard's prompts")
    truth_of(config, prompts)
    if held_out in {reward.name for reward in config.rewards}:
        raise ValueError(f"guard.held_out_reward {held_out!r} is one that the run trains on: give another")
    if held_out is not None and held_out not in offered:
        raise ValueError(f"guard.held_out_reward {held_out!r} is not served; served: {', '.join(offered)}")
    measured = measured_metrics(config, settings)
    for key, metric in settings.metrics.items():
        if metric not in measured:
            raise ValueError(f"{key} {metric!r} is not measured; measured: {', '.join(sorted(measured))}")


def measured_metrics(config: RunConfig, settings: GuardConfig) -> set[str]:
    """Return the names of all numbers that a check of this run measures.

    frechet_wanted is the distance to real pictures of the positive word, if the judge knows a style of that name. A
    rule on it serves both a prompt pair and its reverse.
    """
    evaluation, rewards = config.evaluation, list(reward_metrics(config, settings.held_out_reward))
    repeats, has_truth = settings.num_images_per_prompt, evaluation.truth is not None
    names = metric_names(rewards, evaluation.judge_path, evaluation.reference_path, repeats, has_truth)
    names |= {"frechet_wanted"} if _distance_to_positive(config) in names else set()
    return {f"guard/{name}" for name in names}


def _distance_to_positive(config: RunConfig) -> str:
    """Return the metric name of the distance to real pictures of the positive word."""
    return f"frechet_{config.control_words.positive}"
