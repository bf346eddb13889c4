"""ReFL and DRaFT-LV: the image that a late step predicts, scored, with gradient through that one step alone.

From latents x_sigma near the image: clean = x_sigma − sigma·velocity, an Euler step to sigma 0; then decode, reward,
loss = Σ weight · relu(margin − reward).

ReFL (Xu et al., arXiv 2304.05977, algorithm 1): x_sigma is met on the way, at a step drawn from the rollout's last
ones. DRaFT-LV (Clark et al., arXiv 2309.17400, section 4.2): x_sigma is the finished image with fresh noise of the last
step's sigma; the gradient is the mean over several noises. In both, no gradient flows into x_sigma.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from services.config.objective import ObjectiveKind, RewardConfig
from services.contract import PromptPair
from trainer.algorithm.reward_loss import BranchReward, Score
from trainer.algorithm.rollout import Rollout, Sampling, velocity_at
from trainer.flow import euler_step, interpolate, sigma_schedule
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning


@dataclass(frozen=True, slots=True, eq=False)
class LateStep:
    """Latents (batch, tokens, channels) float32 at sigma (batch,), which one trained step takes to sigma 0.

    image_noise (batch, 3, height, width) is for rewards that compare an image with a noised one.
    """

    latents: Tensor
    sigma: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    sampling: Sampling
    image_noise: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LateOutcome:
    """`loss` (0-d, with graph), and to log: rewards (num_rewards, batch)."""

    loss: Tensor
    rewards: Tensor
    seconds_reward: float


@torch.no_grad()
def roll_out_late(
    policy: Policy,
    conditioning: Conditioning,
    noise: Tensor,
    pairs: tuple[PromptPair, ...],
    sampling: Sampling,
    rollout_steps: Tensor,
    num_forwards: int,
    image_noise: Tensor | None = None,
) -> LateStep:
    """ReFL's: each sample as it is after rollout_steps (batch,) Euler steps from `noise` (batch, tokens, channels).

    num_forwards: how often the model is called, at least as often as any sample needs, and equally often on all workers
    (ZeRO stage 3 gathers the weights in each call).
    """
    assert int(rollout_steps.max()) <= num_forwards
    sigmas = sigma_schedule(sampling.num_steps, sampling.shift).to(noise.device)
    rollout_steps = rollout_steps.to(noise.device)
    latents = late = noise
    for number, (sigma, sigma_next) in enumerate(pairwise(sigmas[: num_forwards + 1]), start=1):
        velocity = velocity_at(policy, latents, sigma, conditioning, sampling)
        latents = euler_step(latents, velocity, sigma, sigma_next)
        late = torch.where((rollout_steps == number)[:, None, None], latents, late)
    return LateStep(late, sigmas[rollout_steps], conditioning, pairs, sampling, image_noise)


def renoise(rollout: Rollout, noise: Tensor, image_noise: Tensor | None = None) -> LateStep:
    """DRaFT-LV's: the rollout's images with `noise` (batch, tokens, channels) of the sigma before its last step."""
    sampling = rollout.sampling
    last = sigma_schedule(sampling.num_steps, sampling.shift)[-2].to(noise.device).expand(len(noise))
    latents = interpolate(rollout.clean, noise, last)
    return LateStep(latents, last, rollout.conditioning, rollout.pairs, sampling, image_noise)


def late_step_loss(
    step: LateStep,
    policy: Policy,
    score: Score,
    kind: ObjectiveKind,
    rewards: Sequence[RewardConfig],
) -> LateOutcome:
    """The mean over the batch of Σ weight · relu(margin − reward) of the predicted images."""
    velocity = velocity_at(policy, step.latents, step.sigma, step.conditioning, step.sampling)
    clean = euler_step(step.latents, velocity, step.sigma, torch.zeros_like(step.sigma))
    images = policy.decode_image(clean, step.sampling.height_px, step.sampling.width_px)
    started = time.perf_counter()
    judged = [
        BranchReward(reward, kind, "denoise", torch.zeros(len(images))).judge(
            images, step.pairs, step.image_noise, score
        )
        for reward in rewards
    ]
    seconds_reward = time.perf_counter() - started
    hinges = [
        reward.weight * each.hinge(reward.margin, reward.satisfied_at)
        for reward, each in zip(rewards, judged, strict=True)
    ]
    values = torch.stack([each.rewards.detach() for each in judged])
    return LateOutcome(torch.stack(hinges).sum(dim=0).mean(), values, seconds_reward)
