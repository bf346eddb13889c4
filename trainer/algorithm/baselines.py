"""Train by the baselines ReFL, DRaFT-LV and GRPO: their learners, to compare with Direct-Align on equal terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from services.config.method import DraftLvMethod, GrpoMethod, ReflMethod
from services.config.rewards import RewardConfig
from trainer.algorithm.grpo import NoisyRollout, NoisyStep, clipped_loss, group_advantages, log_ratio, roll_out_noisily
from trainer.algorithm.image_draws import ImageDraws
from trainer.algorithm.last_step import LateStep, late_step_loss, renoise, roll_out_late
from trainer.algorithm.learner import Learner, MicroBatch
from trainer.algorithm.reward_loss import reward_images
from trainer.algorithm.step_metrics import StepMetrics
from trainer.draws import draw_levels, injection_generator, member_generator


class _LateStepLearner(Learner[LateStep]):
    """What ReFL and DRaFT-LV share: the loss and the backward of a late step."""

    def learn(self, step: LateStep) -> None:
        config = self._config
        with self.metrics.timed("branches"):
            with self._locate_errors(step.pairs):
                outcome = late_step_loss(step, self._policy, self._score, config.objective.kind, config.rewards)
            self._backward("the loss", outcome.loss, step.pairs)
        self.metrics.add("loss", outcome.loss)
        self.metrics.add("sigma", step.sigma)
        _record_rewards(self.metrics, config.rewards, outcome.rewards)
        self.metrics.add_seconds("reward", outcome.seconds_reward)


class ReflLearner(_LateStepLearner):
    """ReFL: the step that is trained is drawn for each sample."""

    def _prepare(self, samples: MicroBatch) -> list[list[LateStep]]:
        config, method = self._config, self._config.method
        assert isinstance(method, ReflMethod)
        last = config.rollout.num_steps - 1
        first = min(last, config.rollout.num_steps - math.floor(config.rollout.num_steps * method.late_share))
        steps = [draw_levels(config.seed, samples.step, index, (first, last), 1)[0] for index in samples.indices]
        with self.metrics.timed("rollout"):
            late = roll_out_late(
                self._sampler,
                self._encode(samples.prompts),
                self._start_noise(samples),
                self._pairs(samples),
                self._sampling(samples),
                torch.tensor(steps),
                self._max_over_workers(max(steps)),
                self._image_draws(samples, [0]),
            )
        self._require_finite("a late latent", late.latents, late.pairs)
        return [[late]]

    def _max_over_workers(self, number: int) -> int:
        largest = torch.tensor(number, device=self._policy.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


class DraftLvLearner(_LateStepLearner):
    """DRaFT-LV: each noise has a backward of its own, and the engine takes their mean."""

    def _prepare(self, samples: MicroBatch) -> list[list[LateStep]]:
        method = self._config.method
        assert isinstance(method, DraftLvMethod)
        with self.metrics.timed("rollout"):
            rollout = self._rollout(samples)
        copies = []
        for number in range(method.num_renoisings):
            generators = [
                injection_generator(self._config.seed, samples.step, each, number) for each in samples.indices
            ]
            noise = self._policy.draw_noise(generators, *samples.batch.size)
            copies.append(renoise(rollout, noise, self._image_draws(samples, [number])))
        return [copies]


class GrpoLearner(Learner[NoisyStep]):
    """GRPO: the images of one prompt form a group, in one forward on one worker."""

    def learn(self, step: NoisyStep) -> None:
        method = self._method
        with self.metrics.timed("branches"):
            log_ratios = log_ratio(step, self._policy, method.noise_level)
            loss = clipped_loss(log_ratios, step.advantages, method.clip_range)
            self._backward("the loss", loss, step.pairs)
        self.metrics.add("loss", loss)
        self.metrics.add("sigma", step.sigma)
        self.metrics.add("ratio", log_ratios.exp())
        self.metrics.add("clipped_share", ((log_ratios.exp() - 1).abs() > method.clip_range).double())

    def _prepare(self, samples: MicroBatch) -> list[list[NoisyStep]]:
        seed, method, num_steps = self._config.seed, self._method, self._config.rollout.num_steps
        step, indices, size = samples.step, samples.indices, method.group_size
        generators = [member_generator(seed, step, index, member) for index in indices for member in range(size)]
        with self.metrics.timed("rollout"):
            rollout = roll_out_noisily(
                self._policy,
                self._encode([prompt for prompt in samples.prompts for _ in range(size)]),
                generators,
                tuple(pair for pair in self._pairs(samples) for _ in range(size)),
                self._sampling(samples),
                method.noise_level,
            )
        self._require_finite("a clean latent", rollout.clean, rollout.pairs)
        draws = self._image_draws(samples, range(size))
        if draws.places is not None:  # members of a group are compared, so they are mirrored and shifted alike
            draws = replace(draws, places=draws.places[::size].repeat_interleave(size, dim=0))
        rewards = self._rewards(rollout, draws)
        advantages = group_advantages(rewards.view(-1, size)).flatten()
        drawn = [draw_levels(seed, step, each, (1, num_steps - 2), method.num_trained_steps) for each in indices]
        numbers = torch.tensor(drawn).repeat_interleave(size, dim=0)  # (batch, num_trained_steps)
        steps = [rollout.step(column, advantages) for column in numbers.unbind(dim=1)]
        return [steps[update :: method.num_updates] for update in range(method.num_updates)]

    @property
    def _method(self) -> GrpoMethod:
        assert isinstance(self._config.method, GrpoMethod)
        return self._config.method

    def _rewards(self, rollout: NoisyRollout, image_draws: ImageDraws) -> Tensor:
        """Return Σ weight · reward of the rollout's images, (batch,)."""
        config, sampling = self._config, rollout.sampling
        with torch.no_grad():
            images = self._policy.decode_image(rollout.clean, sampling.height_px, sampling.width_px)
        no_scales = [torch.zeros(len(images))] * len(config.rewards)
        with self._locate_errors(rollout.pairs):
            rewarded = reward_images(
                images,
                rollout.pairs,
                config.rewards,
                config.objective.kind,
                "denoise",
                no_scales,
                image_draws,
                self._score,
            )
        self.metrics.add_seconds("reward", rewarded.seconds)
        return _record_rewards(self.metrics, config.rewards, rewarded.rewards)


def _record_rewards(metrics: StepMetrics, rewards: Sequence[RewardConfig], values: Tensor) -> Tensor:
    """Add each reward's values (num_rewards, batch) to the metrics, and their weighted sum (batch,). Return the sum."""
    total = torch.tensor([reward.weight for reward in rewards], device=values.device) @ values
    metrics.add("reward", total)
    for reward, each in zip(rewards, values, strict=True):
        metrics.add(f"{reward.name}/reward", each)
    return total
