"""The maths of the flow: inverse operations, the paper's identities, and schedules equal to diffusers'."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.config import ObjectiveConfig
from trainer.flow import branches, dynamic_shift, euler_step, interpolate, recover_clean, sigma_schedule

SHAPE = (2, 6, 4)
recoverable = st.floats(0, 0.99)
seeds = st.integers(0, 2**32)


def latents(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def sigmas(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(seeds, recoverable, recoverable)
def test_recover_clean_inverts_interpolate(seed: int, first: float, second: float) -> None:
    clean, noise = latents(seed, 2)
    sigma = sigmas(first, second)
    torch.testing.assert_close(recover_clean(interpolate(clean, noise, sigma), noise, sigma), clean, rtol=0, atol=1e-10)


@given(seeds)
def test_exact_velocity_carries_noise_to_the_image_in_one_step(seed: int) -> None:
    clean, noise = latents(seed, 2)
    reached = euler_step(noise, noise - clean, sigmas(1.0), sigmas(0.0))
    torch.testing.assert_close(reached, clean, rtol=0, atol=1e-12)


@given(seeds, recoverable, recoverable)
def test_recovered_is_clean_moved_by_w_times_the_velocity_error(seed: int, start: float, end: float) -> None:
    clean, noise, velocity = latents(seed, 3)
    sigma_start, sigma_end = sigmas(start, start), sigmas(end, end)
    noisy = interpolate(clean, noise, sigma_start)
    recovered = recover_clean(euler_step(noisy, velocity, sigma_start, sigma_end), noise, sigma_end)
    weight = abs(start - end) / (1 - end)
    direction = -1 if end < start else 1  # denoise goes against the error, invert along it
    expected = clean + direction * weight * (velocity - (noise - clean))
    torch.testing.assert_close(recovered, expected, rtol=0, atol=1e-5)


def test_gradient_through_inject_step_recover() -> None:
    clean, noise, velocity = latents(0, 3)
    start, end = sigmas(0.86, 0.5), sigmas(0.84, 0.55)

    def recovered(clean: Tensor, velocity: Tensor) -> Tensor:
        return recover_clean(euler_step(interpolate(clean, noise, start), velocity, start, end), noise, end)

    assert torch.autograd.gradcheck(recovered, (clean.requires_grad_(), velocity.requires_grad_()))


def test_nothing_is_recovered_from_pure_noise() -> None:
    clean, noise = latents(0, 2)
    with pytest.raises(ValueError, match="sigma must be below 1"):
        recover_clean(clean, noise, sigmas(0.5, 1.0))


@given(st.integers(1, 60), st.floats(0.25, 12))
def test_static_shift_equals_diffusers(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))  # as FluxPipeline calls it
    torch.testing.assert_close(sigma_schedule(num_steps, shift), scheduler.sigmas, rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 5000))
def test_dynamic_shift_equals_diffusers(num_steps: int, num_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=calculate_shift(num_tokens))
    shift = dynamic_shift(num_tokens, base_num_tokens=256, max_num_tokens=4096, base_shift=0.5, max_shift=1.15)
    torch.testing.assert_close(sigma_schedule(num_steps, shift), scheduler.sigmas, rtol=0, atol=1e-6)


@given(st.integers(1, 100), st.floats(0.1, 20))
def test_schedule_falls_from_exactly_one_to_exactly_zero(num_steps: int, shift: float) -> None:
    schedule = sigma_schedule(num_steps, shift)
    assert schedule.shape == (num_steps + 1,)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (5, 0.0), (5, math.nan), (5, math.inf)])
def test_impossible_schedule_is_refused(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="num_steps >= 1 and a finite shift > 0"):
        sigma_schedule(num_steps, shift)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=4))
def test_branches_straddle_a_target_they_share(levels: list[int]) -> None:
    objective = ObjectiveConfig()
    denoise, invert = branches(torch.tensor(levels), objective, shift=3.0)
    assert (denoise.sigma_start > denoise.sigma_end).all()
    assert (invert.sigma_start < invert.sigma_end).all()
    one_level = (0.9643 - 0.75) / 999
    torch.testing.assert_close(denoise.sigma_end, invert.sigma_end, rtol=0, atol=one_level * 1.01)
    unclamped = torch.tensor(levels) > torch.minimum(1000 - torch.tensor(levels), torch.tensor(100))
    assert denoise.sigma_end[unclamped].equal(invert.sigma_end[unclamped])
    for branch in (denoise, invert):  # the published indices 5 … 25 are sigma 0.964 … 0.750
        assert (branch.sigma_start >= 0.75 - 1e-6).all()
        assert (branch.sigma_start <= 0.9643 + 1e-4).all()


def test_preference_scales_run_along_their_ramps() -> None:
    denoise, invert = branches(torch.tensor([1, 999]), ObjectiveConfig(num_delta_levels=1), shift=3.0)
    torch.testing.assert_close(denoise.preference_scale, torch.tensor([0.1, 0.25]), rtol=0, atol=2e-4)
    torch.testing.assert_close(invert.preference_scale, torch.tensor([0.3, 0.01]), rtol=0, atol=7e-4)


@pytest.mark.parametrize("level", [0, 1000, -1])
def test_level_outside_the_training_levels_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=r"level_range"):
        branches(torch.tensor([level]), ObjectiveConfig(), shift=3.0)


@pytest.mark.parametrize("index_range", [(25, 5), (5, 51), (-1, 5)])
def test_impossible_grid_range_is_refused(index_range: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="grid_index_range must rise"):
        branches(torch.tensor([500]), ObjectiveConfig(grid_index_range=index_range), shift=3.0)
