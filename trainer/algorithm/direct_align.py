"""Injection in, loss out: known noise, one step with gradient, recover, decode, rewards (Direct-Align, SRPO).

Source: Shen et al., arXiv 2509.06942. Only one transformer call carries gradient, whatever the noise level. The
rewards' gradients come from the reward service as pictures, so that no reward model lives in the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.config.objective import ObjectiveConfig, RewardConfig
from trainer.algorithm.reward_loss import BranchReward, Score
from trainer.algorithm.rollout import Injection
from trainer.flow import Branch, euler_step, interpolate, recover_clean, schedule_at
from trainer.model.policy import Policy


@dataclass(frozen=True, slots=True, eq=False)
class BranchOutcome:
    """What one branch gives: `loss` (0-d, with graph) to run backward on, and what to log.

    rewards, preference_scales (num_rewards, batch), in the order of the run's rewards; discount (batch,).
    """

    loss: Tensor
    rewards: Tensor
    preference_scales: Tensor
    discount: Tensor
    seconds_reward: float


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """The trained step, all shaped as rollout.clean: latents at sigma_start, velocity there, clean latents again."""

    noisy: Tensor
    velocity: Tensor
    recovered: Tensor


def branch_loss(
    branch: Branch,
    injection: Injection,
    policy: Policy,
    score: Score,
    objective: ObjectiveConfig,
    rewards: Sequence[RewardConfig],
) -> BranchOutcome:
    """The branch's loss: mean over the batch of λ · Σ weight · relu(margin − reward).

    The caller averages over branches. Run backward on it before the next branch's forward (ZeRO stage 3 drops
    gradients otherwise).
    """
    recovered = recover_anchor(branch, injection, policy, objective).recovered
    sampling, pairs = injection.rollout.sampling, injection.rollout.pairs
    images = policy.decode_image(recovered, sampling.height_px, sampling.width_px)
    scales = [schedule_at(each.preference_scale(branch.name), branch.levels, objective.num_levels) for each in rewards]
    started = time.perf_counter()
    judged = [
        BranchReward(reward, objective.kind, branch.name, scale).judge(images, pairs, injection.image_noise, score)
        for reward, scale in zip(rewards, scales, strict=True)
    ]
    seconds_reward = time.perf_counter() - started
    hinges = [
        reward.weight * each.hinge(reward.margin, reward.satisfied_at)
        for reward, each in zip(rewards, judged, strict=True)
    ]
    discount = schedule_at(objective.discount, branch.levels, objective.num_levels)
    # the gradient of an image's loss reaches the velocity times w
    factor = discount / branch.recovery_weight if objective.recovery_weight == "normalised" else discount
    loss = (factor.to(images.device) * torch.stack(hinges).sum(dim=0)).mean()
    values = torch.stack([each.rewards.detach() for each in judged])
    return BranchOutcome(loss, values, torch.stack(scales), discount, seconds_reward)


def recover_anchor(branch: Branch, injection: Injection, policy: Policy, objective: ObjectiveConfig) -> Recovery:
    """Inject, one step with gradient, recover: recovered = clean ∓ w·(velocity − (noise − clean))."""
    rollout, noise, branch = injection.rollout, injection.noise, branch.to(injection.noise.device)
    noisy = interpolate(rollout.clean, noise, branch.sigma_start)
    velocity = policy.predict_velocity(
        noisy,
        branch.sigma_start,
        rollout.conditioning,
        objective.train_guidance_scale,
        rollout.sampling.height_px,
        rollout.sampling.width_px,
        truncate_timestep=objective.truncate_timestep,
    )
    stepped = euler_step(noisy, velocity, branch.sigma_start, branch.sigma_end)
    return Recovery(noisy, velocity, recover_clean(stepped, noise, branch.sigma_end))
