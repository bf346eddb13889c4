"""Prompts in, images out: the Euler sampler without gradient, and the Rollout that a training step starts from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from services.contract import PromptPair
from trainer.flow import euler_step, sigma_schedule
from trainer.flux import Conditioning, FluxModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How noise becomes an image; `shift` as resolved by FluxModel.resolve_shift.

    >>> Sampling(num_steps=25, guidance_scale=1.0, shift=3.0, height_px=720, width_px=720)
    """

    num_steps: int
    guidance_scale: float
    shift: float
    height_px: int
    width_px: int


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """The two ends of one trajectory without gradient: Direct-Align's anchor and the noise it came from.

    noise, clean: (batch, tokens, channels) packed float32; one pair and one training level (batch,) an image.
    """

    noise: Tensor
    clean: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    levels: Tensor
    sampling: Sampling


@torch.no_grad()
def sample(
    transformer: nn.Module, flux: FluxModel, conditioning: Conditioning, noise: Tensor, sampling: Sampling
) -> Tensor:
    """Clean latents, shaped as `noise` (batch, tokens, channels), by Euler steps from sigma 1 to 0."""
    size = sampling.height_px, sampling.width_px
    latents = noise
    for sigma, sigma_next in pairwise(sigma_schedule(sampling.num_steps, sampling.shift).to(noise.device)):
        velocity = flux.predict_velocity(transformer, latents, sigma, conditioning, sampling.guidance_scale, *size)
        latents = euler_step(latents, velocity, sigma, sigma_next)
    return latents


def roll_out(
    transformer: nn.Module,
    flux: FluxModel,
    conditioning: Conditioning,
    noise: Tensor,
    pairs: tuple[PromptPair, ...],
    levels: Tensor,
    sampling: Sampling,
) -> Rollout:
    """Sample a micro-batch of anchors (METHOD.md, Direct-Align step 1); conditioning is without control words."""
    if not len(conditioning) == len(noise) == len(pairs) == len(levels):
        counts = f"{len(conditioning)}, {len(noise)}, {len(pairs)} and {len(levels)}"
        raise ValueError(f"conditioning, noise, pairs and levels must be one for each image, not {counts}")
    clean = sample(transformer, flux, conditioning, noise, sampling)
    return Rollout(noise, clean, conditioning, pairs, levels, sampling)
