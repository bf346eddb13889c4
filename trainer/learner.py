"""A worker's part of a training step: roll out its prompts, inject, learn from each injection, update the policy.

learner = Learner(config, engine, flux, score, encode)
for injections in learner.roll_out(step):
    for injection in injections:
        learner.learn(injection)
    learner.update()

What a sample gets follows from (seed, step, sample index) alone, so that a step is the same on any number of workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.config import RunConfig
from services.contract import PromptPair
from services.method import DirectAlignMethod, DraftLvMethod, GrpoMethod
from trainer.direct_align import BranchOutcome, branch_loss
from trainer.engine import Engine
from trainer.flow import Branch, branches
from trainer.flux import Conditioning, FluxModel
from trainer.prompts import (
    batch_indices,
    draw_levels,
    image_generator,
    injection_generator,
    load_prompts,
    noise_generator,
    shard,
)
from trainer.record import StepNumbers
from trainer.reward_loss import Score
from trainer.rollout import Injection, Rollout, Sampling, roll_out

Encode = Callable[[Sequence[str]], Conditioning]
Material = TypeVar("Material")  # what a rollout gives one backward or several


def num_backwards(config: RunConfig) -> int:
    """How often a worker runs backward between two updates of the policy."""
    method, objective, each = config.method, config.objective, 1
    if isinstance(method, DirectAlignMethod):
        each = len(objective.branches) * (1 if objective.update_per_injection else objective.num_injections)
    elif isinstance(method, DraftLvMethod):
        each = method.num_renoisings
    elif isinstance(method, GrpoMethod):
        each = method.num_trained_steps // method.num_updates
    return each * config.engine.num_micro_batches


def worker_samples(
    config: RunConfig, prompts: Sequence[str], step: int, rank: int, num_workers: int
) -> list[tuple[int, str]]:
    """A worker's part of a step's global batch: sample indices and their prompts."""
    order = batch_indices(config.seed, step, config.engine.global_batch, len(prompts))
    return [(index, prompts[order[index]]) for index in shard(config.engine.global_batch, rank, num_workers)]


class StepLearner(ABC, Generic[Material]):
    """The verbs of a step, called on all workers in the same order; `numbers` gathers what they have to tell."""

    def __init__(self, config: RunConfig, engine: Engine, flux: FluxModel, score: Score, encode: Encode) -> None:
        self.numbers = StepNumbers()
        self._config, self._engine, self._flux, self._score, self._encode = config, engine, flux, score, encode
        self._prompts = load_prompts(config.prompts.path)
        self._size = config.model.height_px, config.model.width_px
        rollout = config.rollout
        self._shift = flux.resolve_shift(rollout.shift, *self._size)
        truncate = config.objective.truncate_timestep
        self._sampling = Sampling(rollout.num_steps, rollout.guidance_scale, self._shift, *self._size, truncate)

    def roll_out(self, step: int) -> list[list[Material]]:
        """Roll out the worker's prompts, a micro-batch at a time. Returns what to learn from, grouped by update."""
        engine = self._config.engine
        samples = worker_samples(self._config, self._prompts, step, dist.get_rank(), dist.get_world_size())
        by_rollout = []
        for start in range(0, len(samples), engine.micro_batch):
            indices, prompts = zip(*samples[start : start + engine.micro_batch], strict=True)
            by_rollout.append(self._prepare(step, indices, prompts))
        return [list(chain.from_iterable(groups)) for groups in zip(*by_rollout, strict=True)]

    @abstractmethod
    def learn(self, material: Material) -> None:
        """Forward and backward, as often as num_backwards counts for it."""

    @abstractmethod
    def _prepare(self, step: int, indices: Sequence[int], prompts: Sequence[str]) -> list[list[Material]]:
        """Roll out a micro-batch; its materials, grouped by update."""

    def update(self) -> None:
        """One optimiser step."""
        with self.numbers.timed("update"):
            self.numbers.add("grad_norm", self._engine.step())

    def _rollout(self, step: int, indices: Sequence[int], prompts: Sequence[str]) -> Rollout:
        return roll_out(
            self._engine.policy,
            self._flux,
            self._encode(prompts),
            self._start_noise(step, indices),
            self._pairs(prompts),
            self._sampling,
        )

    def _start_noise(self, step: int, indices: Sequence[int]) -> Tensor:
        generators = [noise_generator(self._config.seed, step, index) for index in indices]
        return self._flux.draw_noise(generators, *self._size)

    def _pairs(self, prompts: Sequence[str]) -> tuple[PromptPair, ...]:
        words = self._config.control_words
        return tuple(PromptPair(prompt, words.positive, words.negative) for prompt in prompts)

    def _image_noise(self, step: int, indices: Sequence[int], number: int) -> Tensor | None:
        """For rewards that compare an image with a noised one; None where the run has none."""
        if all(reward.pair != "noised_image" for reward in self._config.rewards):
            return None
        generators = [image_generator(self._config.seed, step, index, number) for index in indices]
        return torch.stack([torch.randn(3, *self._size, generator=each) for each in generators])


class Learner(StepLearner[Injection]):
    """Direct-Align: a rollout's material is its injections."""

    def learn(self, injection: Injection) -> None:
        """All branches of an injection, each one's backward before the next one's forward (Engine.backward: why)."""
        config = self._config
        for branch in branches(injection.levels, config.objective, self._shift):
            with self.numbers.timed("branches"):
                outcome = branch_loss(
                    branch, injection, self._engine.policy, self._flux, self._score, config.objective, config.rewards
                )
                self._engine.backward(outcome.loss)
            self._note(branch, outcome)

    def _prepare(self, step: int, indices: Sequence[int], prompts: Sequence[str]) -> list[list[Injection]]:
        with self.numbers.timed("rollout"):
            rollout = self._rollout(step, indices, prompts)
        injections = self._injections(step, indices, rollout)
        return [[each] for each in injections] if self._config.objective.update_per_injection else [injections]

    def _injections(self, step: int, indices: Sequence[int], rollout: Rollout) -> list[Injection]:
        """The rollout's injections in order of their levels, from the least noisy one."""
        seed, objective = self._config.seed, self._config.objective
        by_sample = [draw_levels(seed, step, each, objective.level_range, objective.num_injections) for each in indices]
        injections = []
        for number, levels in enumerate(zip(*by_sample, strict=True)):
            noise = rollout.noise
            if objective.injection_noise == "fresh":
                generators = [injection_generator(seed, step, index, number) for index in indices]
                noise = self._flux.draw_noise(generators, *self._size)
            image_noise = self._image_noise(step, indices, number)
            injections.append(Injection(rollout, noise, torch.tensor(levels), image_noise))
        return injections

    def _note(self, branch: Branch, outcome: BranchOutcome) -> None:
        rewards, note = self._config.rewards, self.numbers.add
        note("loss", outcome.loss)
        weights = torch.tensor([reward.weight for reward in rewards], device=outcome.rewards.device)
        note(f"reward_{branch.name}", weights @ outcome.rewards)
        for reward, values, scales in zip(rewards, outcome.rewards, outcome.preference_scales, strict=True):
            note(f"{reward.name}/reward_{branch.name}", values)
            note(f"{reward.name}/preference_scale_{branch.name}", scales)
        note(f"discount_{branch.name}", outcome.discount)
        note(f"recovery_weight_{branch.name}", branch.recovery_weight)
        self.numbers.add_seconds("reward", outcome.seconds_reward)
