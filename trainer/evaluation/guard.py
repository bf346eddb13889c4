"""The guard of a running training: at its checks it draws pictures, measures them, and knows whether the run must end.

Worker 0 measures. Every worker notes the numbers that the rules name, so that all decide alike (stop_rules.py) and
nobody waits for a worker that has stopped. The notes travel in the checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.clients.reward import RewardClient
from services.config.run import GuardConfig, RunConfig
from trainer.algorithm.rollout import Sampling
from trainer.data.conditioning import located_guard_prompts
from trainer.draws import guard_generator
from trainer.evaluation.drawing import PictureSet
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurements, Measurer, metric_names
from trainer.evaluation.similarities import similarities
from trainer.evaluation.stop_rules import Check, best_check, broken_rule, exported_check, require_sound_base

_NOTES = "guard.json"
_BASE_PICTURES = "guard_base.safetensors"


class Guard:
    """What the guard holds between checks; it has a measurer on worker 0 only. `folder` is the run's."""

    def __init__(
        self,
        config: RunConfig,
        guard: GuardConfig,
        sampling: Sampling,
        measurer: Measurer | None,
        device: torch.device,
    ) -> None:
        self._guard, self._num_steps, self._wanted = guard, config.num_steps, _wanted(config)
        self._measurer, self._device = measurer, device
        self._base_path = config.output_dir / config.name / _BASE_PICTURES
        self._base: Measurements | None = None
        self._checks: list[Check] = []
        each = guard.num_images_per_prompt
        prompts = tuple(prompt for prompt in guard_prompts(config, guard) for _ in range(each))
        self.pictures = PictureSet(prompts, config.seed, config.evaluation.batch, sampling, guard_generator)

    def is_due(self, step: int) -> bool:
        return step % self._guard.every_num_steps == 0 or step == self._num_steps

    def check(self, step: int, images: Tensor | None) -> dict[str, float]:
        """Measure the guard's pictures and note what the rules name. Called on all workers; the numbers on worker 0.

        `images` as PictureSet.draw gives them. Raises ValueError for a number that is not finite, and at step 0 for a
        rule that the base model already breaks.
        """
        numbers = {} if self._measurer is None or images is None else self._measured(self._measurer, step, images)
        names = sorted(set(self._guard.metrics.values()))
        values = torch.tensor([numbers.get(name, math.nan) for name in names], dtype=torch.float64, device=self._device)
        dist.broadcast(values, src=0)
        noted = dict(zip(names, values.tolist(), strict=True))
        if wrong := {name: value for name, value in noted.items() if not math.isfinite(value)}:
            raise ValueError(f"step {step}: the guard cannot judge by numbers that are not finite: {wrong}")
        self._checks = [check for check in self._checks if check.step < step] + [Check(step, noted)]
        require_sound_base(self._guard, self._checks[0])
        return numbers

    @property
    def broken_rule(self) -> str | None:
        """Why the run must end now, with the numbers; None while it may go on."""
        return broken_rule(self._guard, self._checks)

    @property
    def last_step(self) -> int:
        """The step of the last check."""
        return self._checks[-1].step

    @property
    def exported_step(self) -> int:
        """The step whose weights the run gives, if it ends at the last check."""
        return exported_check(self._guard, self._checks).step

    def is_best(self, step: int) -> bool:
        """Whether the last check was made at `step` and is the best so far: its weights must be kept."""
        return self.last_step == step == best_check(self._guard, self._checks).step

    def save(self, folder: Path) -> None:
        notes = [asdict(check) for check in self._checks]
        (folder / _NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
        self._checks = [Check(**note) for note in notes]

    def _measured(self, measurer: Measurer, step: int, images: Tensor) -> dict[str, float]:
        seen = measurer.measure(images, self.pictures.prompts, None if step == 0 else self._base_seen(measurer))
        if step == 0:
            self._base = seen
            self._base_path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"images": images}, self._base_path)
        numbers = measurer.summarize(seen)
        if (wanted := numbers.get(self._wanted)) is not None:
            numbers["frechet_wanted"] = wanted
        return {f"guard/{name}": number for name, number in numbers.items()}

    def _base_seen(self, measurer: Measurer) -> Measurements:
        """The base model's pictures; a resumed run has them from its folder."""
        if self._base is None:
            self._base = measurer.measure(load_file(self._base_path)["images"], self.pictures.prompts)
        return self._base


def guard_prompts(config: RunConfig, guard: GuardConfig) -> tuple[str, ...]:
    """The prompts of every check. Raises PromptsError where there are fewer than guard.num_prompts."""
    return tuple(each.prompt for each in located_guard_prompts(config, guard))


def reward_metrics(config: RunConfig, guard: GuardConfig) -> dict[str, str]:
    """Name of the number -> reward: those trained on, by their names where there are several, and the held-out one."""
    names = [reward.name for reward in config.rewards]
    trained = {f"reward_{name}": name for name in names} if len(names) > 1 else {"reward": names[0]}
    return trained | ({"held_out_reward": guard.held_out_reward} if guard.held_out_reward else {})


def guard_measurer(config: RunConfig, guard: GuardConfig, client: RewardClient, judges: Judges | None) -> Measurer:
    """What measures the pictures of the checks: the rewards of `client`'s service, the judges, real pictures."""
    rewards = {
        name: partial(similarities, client, config, reward) for name, reward in reward_metrics(config, guard).items()
    }
    return Measurer(rewards, judges, config.evaluation.reference_path, guard.num_images_per_prompt)


def check_guard(config: RunConfig, guard: GuardConfig, offered: Collection[str]) -> None:
    """Raise ValueError, before anything starts, for a guard that could not look or judge; `offered` rewards are served.

    Raises PromptsError where there are too few prompts.
    """
    prompts, judges, held_out = guard_prompts(config, guard), config.evaluation.judge_path, guard.held_out_reward
    if judges and (unknown := sorted(set(prompts) - set(Judges.subjects(judges)))):
        raise ValueError(f"evaluation.judge_path knows no subject {unknown[0]!r} of the guard's prompts")
    if held_out in {reward.name for reward in config.rewards}:
        raise ValueError(f"guard.held_out_reward {held_out!r} is one that the run trains on: give another")
    if held_out is not None and held_out not in offered:
        raise ValueError(f"guard.held_out_reward {held_out!r} is not served; served: {', '.join(offered)}")
    measured = measured_metrics(config, guard)
    for key, metric in guard.metrics.items():
        if metric not in measured:
            raise ValueError(f"{key} {metric!r} is not measured; measured: {', '.join(sorted(measured))}")


def measured_metrics(config: RunConfig, guard: GuardConfig) -> set[str]:
    """The names of all that a check of this run measures.

    frechet_wanted is the distance to real pictures of the positive word, where the judge knows a style of that name:
    a rule on it serves a pair and its reverse.
    """
    evaluation, rewards = config.evaluation, list(reward_metrics(config, guard))
    names = metric_names(rewards, evaluation.judge_path, evaluation.reference_path, guard.num_images_per_prompt)
    return {f"guard/{name}" for name in names | ({"frechet_wanted"} if _wanted(config) in names else set())}


def _wanted(config: RunConfig) -> str:
    return f"frechet_{config.control_words.positive}"
