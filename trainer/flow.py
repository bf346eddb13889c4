"""Rectified flow and Direct-Align's one step: sigmas, interpolation, recovery, branches. Pure mathematics.

Conventions: sigma is the noise level in [0, 1], 1 is noise; x_sigma = (1 − sigma)·clean + sigma·noise; velocity is
noise − clean. Sigmas are 0-d (the same for the whole batch) or (batch,). Source: Shen et al., arXiv 2509.06942.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.config.fields import Schedule
from services.config.objective import ObjectiveConfig
from services.config.rewards import BranchName


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """Return the sigmas of a sampler with `num_steps` Euler steps: (num_steps + 1,) float32, falling from 1 to 0.

    `shift` s moves uniform times t toward noise: s·t / (1 + (s − 1)·t). Raise ValueError unless both are positive.
    """
    if num_steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"a sigma schedule needs num_steps >= 1 and a finite shift > 0, not {num_steps} and {shift}")
    uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)  # float64, so that 1 stays exactly 1
    return (shift * uniform / (1 + (shift - 1) * uniform)).float()


def dynamic_shift(
    num_tokens: int, *, base_num_tokens: int, max_num_tokens: int, base_shift: float, max_shift: float
) -> float:
    """Return FLUX's shift by resolution: exp(mu), where mu is linear in the number of image tokens."""
    slope = (max_shift - base_shift) / (max_num_tokens - base_num_tokens)
    return math.exp(base_shift + slope * (num_tokens - base_num_tokens))


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Inject noise: return x_sigma = (1 − sigma)·clean + sigma·noise, shaped as `clean`."""
    sigma = _per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Step along the velocity from sigma to sigma_next, toward the image (sigma_next < sigma) or toward noise."""
    return latents + _per_sample(sigma_next - sigma, latents) * velocity


def recover_clean(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean latents if `noise` is what was injected: (x_sigma − sigma·noise) / (1 − sigma).

    This inverts `interpolate`. Raise ValueError at sigma >= 1, where nothing of the image is left.
    """
    if bool((sigma >= 1).any()):
        raise ValueError(f"nothing can be recovered at sigma {sigma.max().item()}: sigma must be below 1")
    sigma = _per_sample(sigma, latents)
    return (latents - sigma * noise) / (1 - sigma)


def _per_sample(sigma: Tensor, latents: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (latents.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One trained step of SRPO (arXiv 2509.06942, figure 2: two branches per anchor); all tensors (batch,).

    denoise: sigma goes down, the image is rewarded for the positive words. invert: sigma goes up, the words swap.
    k and λ are read at `levels`.

    >>> Branch("denoise", torch.tensor([400]), torch.tensor([0.86]), torch.tensor([0.84])).recovery_weight
    tensor([0.1250])
    """

    name: BranchName
    levels: Tensor
    sigma_start: Tensor
    sigma_end: Tensor

    @property
    def recovery_weight(self) -> Tensor:
        """Return w of recovered = clean ∓ w·(velocity − (noise − clean)): how strongly the velocity moves the image."""
        return (self.sigma_start - self.sigma_end).abs() / (1 - self.sigma_end)

    def to(self, device: torch.device) -> Branch:
        """Return the same branch on another device."""
        return Branch(self.name, self.levels.to(device), self.sigma_start.to(device), self.sigma_end.to(device))


def branches(levels: Tensor, objective: ObjectiveConfig, shift: float) -> tuple[Branch, ...]:
    """Return the objective's branches at training levels m, (batch,) integers in [1, num_levels − 1].

    Level n has sigma σ[N − n]: a high level is noisy. Both branches aim at level m: denoise from m + K, invert from
    m − K, where K is the number of levels in Δσ, shrunk near both ends. Where K reaches m, invert starts at level 1
    instead of 0 and so aims one level higher, as published. Raise ValueError, which names the key.
    """
    size = objective.num_levels
    if bool(((levels < 1) | (levels >= size)).any()):
        raise ValueError(f"levels must lie in [1, {size - 1}], not {levels.tolist()}; change objective.level_range")
    sigmas = level_sigmas(objective, shift)
    delta = torch.minimum(levels, size - levels).clamp(max=num_delta_levels(objective, sigmas))
    lower = (levels - delta).clamp(min=1)
    both = {
        "denoise": Branch("denoise", levels, sigmas[size - (levels + delta)], sigmas[size - levels]),
        "invert": Branch("invert", lower, sigmas[size - lower], sigmas[size - (lower + delta).clamp(max=size)]),
    }
    return tuple(both[name] for name in objective.branches)


def level_sigmas(objective: ObjectiveConfig, shift: float) -> Tensor:
    """Return σ[0 … N − 1], falling: objective.sigma_range, or a piece of the shifted grid, cut into equal parts."""
    if objective.sigma_range is not None:
        low, high = objective.sigma_range
    else:
        grid = sigma_schedule(objective.num_grid_steps, shift)
        high, low = (grid[index].item() for index in objective.grid_index_range)
    return torch.linspace(high, low, objective.num_levels, dtype=torch.float64).float()


def num_delta_levels(objective: ObjectiveConfig, sigmas: Tensor) -> int:
    """Return Δσ as a number of levels, at least one. Raise ValueError if it exceeds the range of `sigmas`."""
    if objective.delta_sigma is None:
        return objective.num_delta_levels
    high, low = sigmas[0].item(), sigmas[-1].item()
    if objective.delta_sigma > high - low:
        raise ValueError(
            f"objective.delta_sigma {objective.delta_sigma} is larger than the range of sigma, [{low:.4f}, {high:.4f}]"
        )
    return max(1, round(objective.delta_sigma / (high - low) * (len(sigmas) - 1)))


def schedule_at(schedule: Schedule, levels: Tensor, num_levels: int) -> Tensor:
    """Return the schedule's value at each level, (batch,) float32. cosine: start + (end − start)·(1 − cos πx) / 2."""
    rise = 0.0 if schedule.end is None else schedule.end - schedule.start
    if schedule.kind == "cosine":
        share = (1 - torch.cos(math.pi * levels.double() / (num_levels - 1))) / 2
        return (schedule.start + rise * share).float()
    return (schedule.start + rise * levels.double() / (num_levels - 1)).float()
