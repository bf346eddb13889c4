"""GRPO's noisy sampler keeps the distribution, its ratio begins at 1, and its gradient climbs a known reward."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.contract import PromptPair
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.algorithm.grpo import (
    NoisyRollout,
    clipped_loss,
    group_advantages,
    log_density,
    log_ratio,
    noisy_step,
    roll_out_noisily,
)
from trainer.algorithm.rollout import Sampling
from trainer.flow import euler_step, sigma_schedule
from trainer.model.policy import Policy

NOISE_LEVEL = 0.7
SAMPLING = Sampling(5, 1.0, 3.0, HEIGHT_PX, WIDTH_PX)


def gaussian_velocity(latents: Tensor, sigma: Tensor, mean: float, std: float) -> Tensor:
    """E[noise − clean | latents], exact where clean ~ N(mean, std²)."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    centered = (latents - (1 - sigma) * mean) / variance
    return sigma * centered - (mean + (1 - sigma) * std**2 * centered)


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_noisy_sampling_keeps_the_distribution_at_every_sigma(noise_level: float) -> None:
    mean, std, num_steps, random = 0.6, 0.5, 400, torch.Generator().manual_seed(0)
    sigmas = sigma_schedule(num_steps, 3.0).double()
    latents = torch.randn(1, 1, 40_000, generator=random, dtype=torch.float64)
    for number in range(num_steps):
        sigma, sigma_next = sigmas[number], sigmas[number + 1]
        velocity = gaussian_velocity(latents, sigma, mean, std)
        if number in (0, num_steps - 1):
            latents = euler_step(latents, velocity, sigma, sigma_next)
        else:
            center, spread = noisy_step(latents, velocity, sigma, sigma_next, noise_level)
            latents = center + spread * torch.randn(latents.shape, generator=random, dtype=torch.float64)
        if number % 100 == 99:
            assert latents.mean().item() == pytest.approx(float(1 - sigma_next) * mean, abs=0.02)
            expected = math.sqrt(float(1 - sigma_next) ** 2 * std**2 + float(sigma_next) ** 2)
            assert latents.std().item() == pytest.approx(expected, abs=0.02)


def test_without_noise_the_step_is_eulers() -> None:
    latents, velocity = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    sigma, sigma_next = torch.tensor([0.8, 0.4]), torch.tensor([0.7, 0.1])
    mean, std = noisy_step(latents, velocity, sigma, sigma_next, 1e-6)
    torch.testing.assert_close(mean, euler_step(latents, velocity, sigma, sigma_next))
    assert std.max() < 1e-5


@pytest.fixture(scope="module")
def rollout(flux: Policy) -> NoisyRollout:
    prompts = PROMPTS[:3]
    return roll_out_noisily(
        flux,
        flux.encode_prompts(prompts, MAX_SEQUENCE_LENGTH),
        [torch.Generator().manual_seed(seed) for seed in range(3)],
        tuple(PromptPair(prompt, "3D", "Flat") for prompt in prompts),
        SAMPLING,
        NOISE_LEVEL,
    )


def test_the_policy_that_sampled_has_ratio_1_at_every_noisy_step(flux: Policy, rollout: NoisyRollout) -> None:
    for numbers in ([1, 1, 1], [1, 2, 3]):  # each sample may train a step of its own
        step = rollout.step(torch.tensor(numbers), torch.ones(3))
        assert log_ratio(step, flux, NOISE_LEVEL).abs().max() < 1e-6


def test_the_ratio_begins_at_1_in_bfloat16_too(flux_folder: Path) -> None:
    """Rounding would pass for a change of the policy: the clip range is 1e-4."""
    policy = Policy.load(str(flux_folder), torch.bfloat16)
    pairs = tuple(PromptPair(prompt, "3D", "Flat") for prompt in PROMPTS[:3])
    random = [torch.Generator().manual_seed(seed) for seed in range(3)]
    conditioning = policy.encode_prompts(PROMPTS[:3], MAX_SEQUENCE_LENGTH)
    rollout = roll_out_noisily(policy, conditioning, random, pairs, SAMPLING, NOISE_LEVEL)
    assert rollout.latents.dtype == rollout.log_densities.dtype == torch.float32
    for numbers in ([1, 1, 1], [1, 2, 3]):
        step = rollout.step(torch.tensor(numbers), torch.ones(3))
        assert log_ratio(step, policy, NOISE_LEVEL).abs().max() < 1e-6


def test_the_noise_of_an_image_depends_on_its_generator_alone(flux: Policy, rollout: NoisyRollout) -> None:
    alone = roll_out_noisily(
        flux,
        rollout.conditioning[[2]],
        [torch.Generator().manual_seed(2)],
        rollout.pairs[2:],
        SAMPLING,
        NOISE_LEVEL,
    )
    torch.testing.assert_close(alone.clean, rollout.clean[2:], rtol=0, atol=1e-5)


def test_the_gradient_makes_better_than_average_steps_likelier(flux: Policy, rollout: NoisyRollout) -> None:
    advantages = torch.tensor([1.0, -1.0, 0.0])
    step = rollout.step(torch.tensor([1, 2, 3]), advantages)
    parameters = list(flux.transformer.parameters())
    loss = clipped_loss(log_ratio(step, flux, NOISE_LEVEL), advantages, 1e-4)
    gradients = torch.autograd.grad(loss, parameters)
    length = 1e-3 / math.sqrt(sum(float(each.square().sum()) for each in gradients))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(length * gradient)
        moved = log_ratio(step, flux, NOISE_LEVEL)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(length * gradient)
    assert (moved * advantages).sum() > 0


def test_repeated_updates_climb_a_known_reward() -> None:
    """A policy that is one number, the velocity; reward = −|x − 2|² of what a single noisy step gives."""
    random, velocity = torch.Generator().manual_seed(0), torch.zeros((), requires_grad=True)
    sigma, sigma_next, start = torch.tensor(0.5), torch.tensor(0.4), torch.zeros(64, 1, 1)
    optimizer = torch.optim.SGD([velocity], lr=0.3)
    for _ in range(150):
        mean, std = noisy_step(start, velocity, sigma, sigma_next, NOISE_LEVEL)
        drawn = (mean + std * torch.randn(64, 1, 1, generator=random)).detach()
        rewards = -(drawn.flatten() - 2).square()
        advantages = group_advantages(rewards.view(4, 16)).flatten()
        density = log_density(drawn, mean, std)
        optimizer.zero_grad()
        clipped_loss(density - density.detach(), advantages, 0.2).backward()
        optimizer.step()
    assert mean.mean().item() > 1.0, "it began at 0 and 2 is best"


def test_advantages_are_relative_to_the_group() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]])
    assert group_advantages(rewards).tolist() == [pytest.approx([-1, 0, 1], abs=1e-5), [0, 0, 0]]


@pytest.mark.parametrize(("log_r", "advantage", "has_gradient"), [(0.3, 1, False), (0.3, -1, True), (-0.3, -1, False)])
def test_the_clip_stops_a_step_that_has_gone_far_enough(log_r: float, advantage: float, has_gradient: bool) -> None:
    ratio = torch.tensor([log_r], requires_grad=True)
    clipped_loss(ratio, torch.tensor([float(advantage)]), 0.2).backward()
    assert ratio.grad is not None
    assert bool(ratio.grad.abs().sum() > 0) == has_gradient


def test_densities_are_those_of_a_gaussian(rollout: NoisyRollout) -> None:
    step = rollout.step(torch.tensor([1, 2, 3]), torch.zeros(3))
    other = replace(step, latents_next=step.latents_next + 0.1)
    mean, std = torch.zeros_like(step.latents), torch.full((3, 1, 1), 0.7)
    ours = log_density(other.latents_next, mean, std) - log_density(step.latents_next, mean, std)
    normal = torch.distributions.Normal(mean, std)
    theirs = normal.log_prob(other.latents_next) - normal.log_prob(step.latents_next)
    torch.testing.assert_close(ours, theirs.mean(dim=(1, 2)))
