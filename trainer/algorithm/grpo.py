"""Compute GRPO's parts for flow matching: noisy sampling, group advantages, clipped loss. Rewards need no gradient.

Sources: Flow-GRPO (Liu et al., arXiv 2505.05470, equations 5, 8, 9 and 12); DanceGRPO (Xue et al., arXiv 2505.07818:
a part of the steps is trained). A sampling step from sigma to sigma' < sigma is Gaussian,

    mean = x + (sigma' − sigma)·[v + g² / (2·sigma)·(x + (1 − sigma)·v)],  std = g·sqrt(sigma − sigma'),
    g = a·sqrt(sigma / (1 − sigma)),

where x + (1 − sigma)·v is the noise expected in x, which is −sigma times the score. With small steps, the latents have
the same distribution at every sigma as without noise. g is infinite at sigma 1, and the last step gives the image:
the first and the last step are therefore Euler's.

A density is the geometric mean over the numbers of the latents, not their product, which would leave any clip range at
once. Left out: the KL penalty to the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contract import PromptPair
from trainer.algorithm.rollout import Sampling, velocity_at
from trainer.flow import euler_step, sigma_schedule
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

_MIN_SPREAD = 1e-6  # of the rewards in a group: a group of equal rewards then learns nothing


def noisy_step(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Return the step's mean (batch, tokens, channels) and standard deviation (batch or 1, 1, 1).

    sigma, sigma_next: 0-d or (batch,).
    """
    sigma, sigma_next = sigma.view(-1, 1, 1), sigma_next.view(-1, 1, 1)
    diffusion = noise_level * (sigma / (1 - sigma)).sqrt()
    expected_noise = latents + (1 - sigma) * velocity
    drift = velocity + diffusion.square() / (2 * sigma) * expected_noise
    return latents + (sigma_next - sigma) * drift, diffusion * (sigma - sigma_next).sqrt()


def log_density(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log density (batch,) of latents (batch, tokens, channels) under a Gaussian, averaged over the numbers.

    Terms that do not depend on the mean are left out.
    """
    return -((latents - mean) / std).square().mean(dim=(1, 2)) / 2


def group_advantages(rewards: Tensor) -> Tensor:
    """Return (reward − mean) / standard deviation within each group, (num_groups, group_size) as the rewards."""
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std(dim=1, keepdim=True) + _MIN_SPREAD)


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return PPO's loss −mean min(ratio·A, clip(ratio, 1 ± clip_range)·A), 0-d; log_ratio, advantages A: (batch,)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@dataclass(frozen=True, slots=True, eq=False)
class NoisyStep:
    """A sampling step to train: from latents at sigma to latents_next at sigma_next, with the density it had.

    latents, latents_next (batch, tokens, channels); sigma, sigma_next, log_density, advantages (batch,).
    """

    latents: Tensor
    latents_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    log_density: Tensor
    advantages: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, eq=False)
class NoisyRollout:
    """One noisy sampling: latents (num_steps + 1, batch, tokens, channels), the last of them clean.

    log_densities (num_steps, batch) are 0 for the two steps without noise.
    """

    latents: Tensor
    log_densities: Tensor
    conditioning: Conditioning
    pairs: tuple[PromptPair, ...]
    sampling: Sampling

    @property
    def clean(self) -> Tensor:
        return self.latents[-1]

    def step(self, numbers: Tensor, advantages: Tensor) -> NoisyStep:
        """Return one step for each sample: number `numbers` (batch,), in [1, num_steps − 2]."""
        sigmas = sigma_schedule(self.sampling.num_steps, self.sampling.shift).to(self.latents.device)
        rows = torch.arange(len(numbers))
        return NoisyStep(
            latents=self.latents[numbers, rows],
            latents_next=self.latents[numbers + 1, rows],
            sigma=sigmas[numbers],
            sigma_next=sigmas[numbers + 1],
            log_density=self.log_densities[numbers, rows],
            advantages=advantages,
            conditioning=self.conditioning,
            pairs=self.pairs,
            sampling=self.sampling,
        )


@torch.no_grad()
def roll_out_noisily(
    policy: Policy,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    pairs: tuple[PromptPair, ...],
    sampling: Sampling,
    noise_level: float,
) -> NoisyRollout:
    """Sample one image for each generator, which draws its start noise and then the noise of each step."""
    size = sampling.height_px, sampling.width_px
    path = [policy.draw_noise(generators, *size)]
    sigmas = sigma_schedule(sampling.num_steps, sampling.shift).to(path[0].device)
    log_densities = torch.zeros(sampling.num_steps, len(generators), device=path[0].device)
    for number in range(sampling.num_steps):
        latents, sigma, sigma_next = path[-1], sigmas[number], sigmas[number + 1]
        velocity = velocity_at(policy, latents, sigma, conditioning, sampling)
        if number in (0, sampling.num_steps - 1):
            path.append(euler_step(latents, velocity, sigma, sigma_next))
            continue
        mean, std = noisy_step(latents, velocity, sigma, sigma_next, noise_level)
        path.append(mean + std * policy.draw_noise(generators, *size))
        log_densities[number] = log_density(path[-1], mean, std)
    return NoisyRollout(torch.stack(path), log_densities, conditioning, pairs, sampling)


def log_ratio(step: NoisyStep, policy: Policy, noise_level: float) -> Tensor:
    """Return the log ratio (batch,) of the step's density under the current policy to that when it was sampled."""
    velocity = velocity_at(policy, step.latents, step.sigma, step.conditioning, step.sampling)
    mean, std = noisy_step(step.latents, velocity, step.sigma, step.sigma_next, noise_level)
    return log_density(step.latents_next, mean, std) - step.log_density
