"""Compute the loss of ReFL and DRaFT-LV: reward the image that one late step predicts, with gradient through that step.

The step starts from latents x_sigma near the image: clean = x_sigma − sigma·velocity, an Euler step to sigma 0. Then
decode and reward; loss = Σ weight · relu(margin − reward).

ReFL (Xu et al., arXiv 2304.05977, algorithm 1) takes x_sigma from the rollout, at one of its last steps, drawn at
random. DRaFT-LV (Clark et al., arXiv 2309.17400, section 4.2) takes the finished image and adds fresh noise of the last
step's sigma; its gradient is the mean over several noises. In both, no gradient flows into x_sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from services.config.objective import ObjectiveKind
from services.config.rewards import RewardConfig
from services.contract import PromptPair
from trainer.algorithm.image_draws import NOTHING_DRAWN, ImageDraws
from trainer.algorithm.reward_loss import Score, reward_images
from trainer.algorithm.rollout import Rollout, Sampling, velocity_at
from trainer.flow import euler_step, interpolate, sigma_schedule
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning


@dataclass(frozen=True, slots=True, eq=False)
class LateStep:
    """The start of a trained step to sigma 0: latents (batch, tokens, channels) float32 at sigma (batch,).

    image_draws: what rewards need at random for these images.
    """

    latents: Tensor
    sigma: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    sampling: Sampling
    image_draws: ImageDraws = NOTHING_DRAWN


@dataclass(frozen=True, slots=True, eq=False)
class LateOutcome:
    """The result of a late step: `loss` (0-d, with graph) to run backward on; to log, rewards (num_rewards, batch)."""

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
    image_draws: ImageDraws = NOTHING_DRAWN,
) -> LateStep:
    """Roll out for ReFL: take each sample after rollout_steps (batch,) Euler steps from `noise`.

    noise: (batch, tokens, channels). num_forwards: how often to call the model. It must be enough for every sample and
    equal on all workers, because ZeRO stage 3 gathers the weights in each call.
    """
    assert int(rollout_steps.max()) <= num_forwards
    sigmas = sigma_schedule(sampling.num_steps, sampling.shift).to(noise.device)
    rollout_steps = rollout_steps.to(noise.device)
    latents = late = noise
    for number, (sigma, sigma_next) in enumerate(pairwise(sigmas[: num_forwards + 1]), start=1):
        velocity = velocity_at(policy, latents, sigma, conditioning, sampling)
        latents = euler_step(latents, velocity, sigma, sigma_next)
        late = torch.where((rollout_steps == number)[:, None, None], latents, late)
    return LateStep(late, sigmas[rollout_steps], conditioning, pairs, sampling, image_draws)


def renoise(rollout: Rollout, noise: Tensor, image_draws: ImageDraws = NOTHING_DRAWN) -> LateStep:
    """Add `noise` (batch, tokens, channels) to the rollout's images for DRaFT-LV, at the sigma before the last step."""
    sampling = rollout.sampling
    last = sigma_schedule(sampling.num_steps, sampling.shift)[-2].to(noise.device).expand(len(noise))
    latents = interpolate(rollout.clean, noise, last)
    return LateStep(latents, last, rollout.conditioning, rollout.pairs, sampling, image_draws)


def late_step_loss(
    step: LateStep,
    policy: Policy,
    score: Score,
    kind: ObjectiveKind,
    rewards: Sequence[RewardConfig],
) -> LateOutcome:
    """Return the mean over the batch of Σ weight · relu(margin − reward) of the predicted images.

    Raises ValueError as reward_images does.
    """
    velocity = velocity_at(policy, step.latents, step.sigma, step.conditioning, step.sampling)
    clean = euler_step(step.latents, velocity, step.sigma, torch.zeros_like(step.sigma))
    images = policy.decode_image(clean, step.sampling.height_px, step.sampling.width_px)
    no_scales = [torch.zeros(len(images))] * len(rewards)
    rewarded = reward_images(images, step.pairs, rewards, kind, "denoise", no_scales, step.image_draws, score)
    return LateOutcome(rewarded.hinges.mean(), rewarded.rewards, rewarded.seconds)
