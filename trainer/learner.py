"""A worker's part of a training step: roll out its prompts, inject, learn from each injection, update the policy.

learner = Learner(config, engine, flux, score, encode)
for injections in learner.roll_out(step):
    for injection in injections:
        learner.learn(injection)
    learner.update()

What a sample gets follows from (seed, step, sample index) alone, so that a step is the same on any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from services.config import RunConfig
from services.contract import PromptPair
from services.reward_client import RewardRejected
from trainer.batches import Batch, open_batches
from trainer.conditioning import Encode
from trainer.direct_align import BranchOutcome, branch_loss
from trainer.engine import Engine
from trainer.flow import Branch, branches
from trainer.flux import FluxModel
from trainer.prompts import (
    draw_levels,
    draw_words,
    image_generator,
    injection_generator,
    noise_generator,
    shard,
)
from trainer.record import StepNumbers
from trainer.reward_loss import Score
from trainer.rollout import Injection, Rollout, Sampling, roll_out


def num_backwards(config: RunConfig) -> int:
    """How often a worker runs backward between two updates of the policy."""
    objective = config.objective
    num_injections = 1 if objective.update_per_injection else objective.num_injections
    return len(objective.branches) * num_injections * config.engine.num_micro_batches


def worker_samples(config: RunConfig, batch: Batch, rank: int, num_workers: int) -> list[tuple[int, str]]:
    """A worker's part of a step's global batch: sample indices and their prompts."""
    return [(index, batch.prompts[index]) for index in shard(config.engine.global_batch, rank, num_workers)]


class StepError(ValueError):
    """A step that would train noise: a number that is not finite, a reward's answer that does not fit.

    The text names step, worker, prompts and cause.
    """


class Learner:
    """The verbs of a step, called on all workers in the same order; `numbers` gathers what they have to tell."""

    def __init__(self, config: RunConfig, engine: Engine, flux: FluxModel, score: Score, encode: Encode) -> None:
        self.numbers = StepNumbers()
        self._step = 0
        self._config, self._engine, self._flux, self._score, self._encode = config, engine, flux, score, encode
        self._batches = open_batches(config, flux.source)
        rollout, truncate = config.rollout, config.objective.truncate_timestep
        self._samplings = {
            size: Sampling(
                rollout.num_steps, rollout.guidance_scale, flux.resolve_shift(rollout.shift, *size), *size, truncate
            )
            for size in config.model.training_sizes
        }

    def follow(self, config: RunConfig) -> None:
        """Go on with the words, scales and weights of `config`, otherwise the same run (helm.py)."""
        self._config = config

    def roll_out(self, step: int) -> list[list[Injection]]:
        """Roll out the worker's prompts, a micro-batch at a time. Returns the step's injections, grouped by update.

        Of a dataset's images the latents are read instead, and the noise drawn. Raises StepError, as do the other
        verbs, for the first number that is not finite.
        """
        engine, batch = self._config.engine, self._batches.batch(step)
        self._step = step
        samples = worker_samples(self._config, batch, dist.get_rank(), dist.get_world_size())
        by_rollout = []
        for start in range(0, len(samples), engine.micro_batch):
            indices, prompts = zip(*samples[start : start + engine.micro_batch], strict=True)
            with self.numbers.timed("rollout"):
                rollout = self._rollout(step, batch, indices, prompts)
                self._require_finite("a clean latent", rollout.clean, rollout.pairs)
            by_rollout.append(self._injections(step, indices, rollout))
        if self._config.objective.update_per_injection:
            return [list(group) for group in zip(*by_rollout, strict=True)]
        return [list(chain.from_iterable(by_rollout))]

    def learn(self, injection: Injection) -> None:
        """All branches of an injection, each one's backward before the next one's forward (Engine.backward: why)."""
        config = self._config
        for branch in branches(injection.levels, config.objective, injection.rollout.sampling.shift):
            with self.numbers.timed("branches"):
                outcome = self._judged(branch, injection)
                self._require_finite(f"the loss of branch {branch.name}", outcome.loss, injection.rollout.pairs)
                self._engine.backward(outcome.loss)
            self._note(branch, outcome)

    def update(self) -> None:
        """One optimiser step. One along a gradient that is not finite costs the weights, but no checkpoint."""
        with self.numbers.timed("update"):
            grad_norm = self._engine.step()
        if not math.isfinite(grad_norm):
            raise StepError(f"step {self._step + 1}: the gradient's norm over all workers is {grad_norm}")
        self.numbers.add("grad_norm", grad_norm)

    def _judged(self, branch: Branch, injection: Injection) -> BranchOutcome:
        config = self._config
        try:
            return branch_loss(
                branch, injection, self._engine.policy, self._flux, self._score, config.objective, config.rewards
            )
        except (ValueError, RewardRejected) as error:
            raise StepError(f"{self._where(injection.rollout.pairs)}, branch {branch.name}: {error}") from error

    def _require_finite(self, what: str, values: Tensor, pairs: Sequence[PromptPair]) -> None:
        """`values` has a row for each pair, or is 0-d and made of all of them."""
        is_finite = values.isfinite().flatten(1).all(dim=1) if values.ndim else values.isfinite().expand(len(pairs))
        if not is_finite.all():
            wrong = [pair for pair, fine in zip(pairs, is_finite.tolist(), strict=True) if not fine]
            raise StepError(f"{self._where(wrong)}: {what} is not finite")

    def _where(self, pairs: Sequence[PromptPair]) -> str:
        prompts = ", ".join(repr(pair.prompt) for pair in pairs)
        return f"step {self._step + 1}, worker {dist.get_rank()}, prompts {prompts}"

    def _rollout(self, step: int, batch: Batch, indices: Sequence[int], prompts: Sequence[str]) -> Rollout:
        generators = [noise_generator(self._config.seed, step, index) for index in indices]
        words = [draw_words(self._config.control_words, self._config.seed, step, index) for index in indices]
        pairs = tuple(
            PromptPair(prompt, each.positive, each.negative) for prompt, each in zip(prompts, words, strict=True)
        )
        conditioning, sampling = self._encode(prompts), self._samplings[batch.size]
        noise = self._flux.draw_noise(generators, *batch.size)
        if batch.clean is not None:
            return Rollout(noise, batch.clean(indices).to(noise.device), conditioning, pairs, sampling)
        return roll_out(self._engine.policy, self._flux, conditioning, noise, pairs, sampling)

    def _injections(self, step: int, indices: Sequence[int], rollout: Rollout) -> list[Injection]:
        """The rollout's injections in order of their levels, from the least noisy one."""
        seed, objective = self._config.seed, self._config.objective
        size = rollout.sampling.height_px, rollout.sampling.width_px
        by_sample = [draw_levels(seed, step, each, objective.level_range, objective.num_injections) for each in indices]
        injections = []
        for number, levels in enumerate(zip(*by_sample, strict=True)):
            noise, image_noise = rollout.noise, None
            if objective.injection_noise == "fresh":
                generators = [injection_generator(seed, step, index, number) for index in indices]
                noise = self._flux.draw_noise(generators, *size)
            if any(reward.pair == "noised_image" for reward in self._config.rewards):
                generators = [image_generator(seed, step, index, number) for index in indices]
                image_noise = torch.stack([torch.randn(3, *size, generator=each) for each in generators])
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
