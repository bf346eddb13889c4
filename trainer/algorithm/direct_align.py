"""Compute Direct-Align's loss of one branch: add known noise, take one step with gradient, recover, decode, reward.

Source: Shen et al., arXiv 2509.06942 (Direct-Align and SRPO). Only one transformer call carries gradient, at any noise
level. The reward service returns each reward's gradient with respect to the image, so no reward model is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.config.objective import ObjectiveConfig
from services.config.rewards import RewardConfig
from trainer.algorithm.reward_loss import Score, reward_images
from trainer.algorithm.rollout import Injection
from trainer.flow import Branch, euler_step, interpolate, recover_clean, schedule_at
from trainer.model.policy import Policy


@dataclass(frozen=True, slots=True, eq=False)
class BranchOutcome:
    """The result of one branch: `loss` (0-d, with graph) to run backward on, and what to log.

    rewards, preference_scales k: (num_rewards, batch), in the order of the run's rewards. discount λ: (batch,).
    """

    loss: Tensor
    rewards: Tensor
    preference_scales: Tensor
    discount: Tensor
    seconds_reward: float


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """The trained step, all shaped as rollout.clean: noisy latents at sigma_start, velocity there, clean latents."""

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
    """Return the branch's loss: the mean over the batch of λ · Σ weight · relu(margin − reward).

    The caller averages over branches. Run backward on the loss before the next branch's forward: ZeRO stage 3 drops
    gradients otherwise. Raises ValueError as reward_images does.
    """
    recovered = recover_anchor(branch, injection, policy, objective).recovered
    sampling, pairs = injection.rollout.sampling, injection.rollout.pairs
    images = policy.decode_image(recovered, sampling.height_px, sampling.width_px)
    scales = [schedule_at(each.preference_scale(branch.name), branch.levels, objective.num_levels) for each in rewards]
    rewarded = reward_images(images, pairs, rewards, objective.kind, branch.name, scales, injection.image_draws, score)
    discount = schedule_at(objective.discount, branch.levels, objective.num_levels)
    # The gradient of an image's loss is multiplied by w on its way to the velocity. "normalized" undoes this.
    factor = discount / branch.recovery_weight if objective.recovery_weight == "normalized" else discount
    loss = (factor.to(images.device) * rewarded.hinges).mean()
    return BranchOutcome(loss, rewarded.rewards, torch.stack(scales), discount, rewarded.seconds)


def recover_anchor(branch: Branch, injection: Injection, policy: Policy, objective: ObjectiveConfig) -> Recovery:
    """Inject the noise, take one step with gradient, and recover: clean ∓ w·(velocity − (noise − clean))."""
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
