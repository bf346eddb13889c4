"""Train by Direct-Align: roll out, inject noise at several levels, and learn from each injection.

learner = DirectAlignLearner(config, engine, policy, score, encode)
for injections in learner.roll_out(step):
    for injection in injections:
        learner.learn(injection)
    learner.update()
"""

from __future__ import annotations

import torch

from services.config.run import RunConfig
from trainer.algorithm.direct_align import BranchOutcome, branch_loss
from trainer.algorithm.learner import Learner, MicroBatch
from trainer.algorithm.reward_loss import Score
from trainer.algorithm.rollout import Injection, Rollout
from trainer.data.conditioning import Encode
from trainer.draws import draw_levels, injection_generator
from trainer.flow import Branch, branches, level_sigmas, num_delta_levels
from trainer.model.engine import Engine
from trainer.model.policy import Policy


class DirectAlignLearner(Learner[Injection]):
    """Direct-Align: each rollout gives several injections to learn from.

    Raises ValueError if objective.delta_sigma does not fit into the levels of one of the run's sizes.
    """

    def __init__(self, config: RunConfig, engine: Engine, policy: Policy, score: Score, encode: Encode) -> None:
        super().__init__(config, engine, policy, score, encode)
        for sampling in self._samplings.values():  # preflight.py cannot: a dynamic shift is the model's
            num_delta_levels(config.objective, level_sigmas(config.objective, sampling.shift))

    def learn(self, injection: Injection) -> None:
        """Run forward and backward for each branch of an injection, one branch at a time (Engine.backward says why)."""
        config = self._config
        for branch in branches(injection.levels, config.objective, injection.rollout.sampling.shift):
            with self.metrics.timed("branches"):
                outcome = self._loss(branch, injection)
                self._backward(f"the loss of branch {branch.name}", outcome.loss, injection.rollout.pairs)
            self._record(branch, outcome)

    def _prepare(self, samples: MicroBatch) -> list[list[Injection]]:
        with self.metrics.timed("rollout"):
            rollout = self._rollout(samples)
        injections = self._injections(samples, rollout)
        return [[each] for each in injections] if self._config.objective.update_per_injection else [injections]

    def _loss(self, branch: Branch, injection: Injection) -> BranchOutcome:
        config = self._config
        with self._locate_errors(injection.rollout.pairs, f", branch {branch.name}"):
            return branch_loss(branch, injection, self._policy, self._score, config.objective, config.rewards)

    def _injections(self, samples: MicroBatch, rollout: Rollout) -> list[Injection]:
        """Return the rollout's injections, ordered by level from the least noisy one."""
        seed, step, objective = self._config.seed, samples.step, self._config.objective
        levels, count = objective.level_range, objective.num_injections
        by_sample = [draw_levels(seed, step, index, levels, count) for index in samples.indices]
        injections = []
        for number, batch_levels in enumerate(zip(*by_sample, strict=True)):
            noise = rollout.noise
            if objective.injection_noise == "fresh":
                generators = [injection_generator(seed, step, index, number) for index in samples.indices]
                noise = self._policy.draw_noise(generators, *samples.batch.size)
            draws = self._image_draws(samples, [number])
            injections.append(Injection(rollout, noise, torch.tensor(batch_levels), draws))
        return injections

    def _record(self, branch: Branch, outcome: BranchOutcome) -> None:
        rewards, add = self._config.rewards, self.metrics.add
        add("loss", outcome.loss)
        weights = torch.tensor([reward.weight for reward in rewards], device=outcome.rewards.device)
        add(f"reward_{branch.name}", weights @ outcome.rewards)
        for reward, values, scales in zip(rewards, outcome.rewards, outcome.preference_scales, strict=True):
            add(f"{reward.name}/reward_{branch.name}", values)
            add(f"{reward.name}/preference_scale_{branch.name}", scales)
        add(f"discount_{branch.name}", outcome.discount)
        add(f"recovery_weight_{branch.name}", branch.recovery_weight)
        self.metrics.add_seconds("reward", outcome.seconds_reward)
