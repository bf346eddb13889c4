"""Sample images from prompts by Euler steps without gradient, and define what a rollout and an injection hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from services.contract import PromptPair
from trainer.algorithm.image_draws import NOTHING_DRAWN, ImageDraws
from trainer.flow import euler_step, sigma_schedule
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of the sampler. `shift` is as resolved by Policy.resolve_shift.

    >>> Sampling(num_steps=25, guidance_scale=1.0, shift=3.0, height_px=720, width_px=720)
    """

    num_steps: int
    guidance_scale: float
    shift: float
    height_px: int
    width_px: int
    truncate_timestep: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """Both ends of a trajectory without gradient: the noise it began with and the clean latents, Direct-Align's anchor.

    noise, clean: (batch, tokens, channels) packed float32. pairs: one for each image.
    """

    noise: Tensor
    clean: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, eq=False)
class Injection:
    """Known noise to add to a rollout's images: `noise` shaped as rollout.clean, a training level (batch,) for each.

    image_draws: what rewards need at random for these images.
    Raises ValueError if the shapes do not fit the rollout.
    """

    rollout: Rollout
    noise: Tensor
    levels: Tensor
    image_draws: ImageDraws = NOTHING_DRAWN

    def __post_init__(self) -> None:
        if self.noise.shape != self.rollout.clean.shape or self.levels.shape != (len(self.noise),):
            shapes = [tuple(tensor.shape) for tensor in (self.noise, self.levels, self.rollout.clean)]
            raise ValueError(f"noise {shapes[0]} and levels {shapes[1]} do not fit images {shapes[2]}")


def velocity_at(
    policy: Policy,
    latents: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    sampling: Sampling,
) -> Tensor:
    """Return the velocity that the sampler follows at `latents` (batch, tokens, channels); sigma is 0-d or (batch,)."""
    return policy.predict_velocity(
        latents,
        sigma,
        conditioning,
        sampling.guidance_scale,
        sampling.height_px,
        sampling.width_px,
        truncate_timestep=sampling.truncate_timestep,
    )


@torch.no_grad()
def sample(policy: Policy, conditioning: Conditioning, noise: Tensor, sampling: Sampling) -> Tensor:
    """Return clean latents, shaped as `noise` (batch, tokens, channels), after Euler steps from sigma 1 to 0."""
    latents = noise
    for sigma, sigma_next in pairwise(sigma_schedule(sampling.num_steps, sampling.shift).to(noise.device)):
        velocity = velocity_at(policy, latents, sigma, conditioning, sampling)
        latents = euler_step(latents, velocity, sigma, sigma_next)
    return latents


def roll_out(
    policy: Policy,
    conditioning: Conditioning,
    noise: Tensor,
    pairs: tuple[PromptPair, ...],
    sampling: Sampling,
) -> Rollout:
    """Sample a micro-batch of anchors (arXiv 2509.06942, Direct-Align).

    conditioning is that of the prompts without control words. Raises ValueError if the counts differ.
    """
    if not len(conditioning) == len(noise) == len(pairs):
        counts = f"{len(conditioning)}, {len(noise)} and {len(pairs)}"
        raise ValueError(f"conditioning, noise and pairs must be one for each image, not {counts}")
    clean = sample(policy, conditioning, noise, sampling)
    return Rollout(noise, clean, conditioning, pairs, sampling)
