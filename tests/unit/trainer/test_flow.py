"""The maths of the flow: inverse operations, the paper's identities, and schedules equal to diffusers'."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.config.fields import Schedule
from services.config.objective import ObjectiveConfig
from services.config.rewards import BranchName
from trainer.flow import (
    branches,
    dynamic_shift,
    euler_step,
    interpolate,
    level_sigmas,
    num_delta_levels,
    recover_clean,
    schedule_at,
    sigma_schedule,
)

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


def test_one_branch_is_that_branch_of_both() -> None:
    levels = torch.tensor([60, 400])
    both = branches(levels, ObjectiveConfig(), shift=3.0)
    for index, name in enumerate(get_args(BranchName)):
        (alone,) = branches(levels, ObjectiveConfig(branches=(name,)), shift=3.0)
        assert alone.name == name
        assert alone.sigma_start.equal(both[index].sigma_start)
        assert alone.sigma_end.equal(both[index].sigma_end)


def test_sigma_range_by_value_is_the_one_by_index() -> None:
    grid = sigma_schedule(50, 3.0)
    by_index = level_sigmas(ObjectiveConfig(grid_index_range=(10, 30)), shift=3.0)
    by_value = level_sigmas(ObjectiveConfig(sigma_range=(grid[30].item(), grid[10].item())), shift=1.0)
    torch.testing.assert_close(by_value, by_index)


def test_delta_sigma_by_value_is_that_far_from_the_target() -> None:
    objective = ObjectiveConfig(sigma_range=(0.5, 0.9), delta_sigma=0.04)
    for branch in branches(torch.tensor([400, 600]), objective, shift=3.0):
        torch.testing.assert_close(
            (branch.sigma_start - branch.sigma_end).abs(), torch.full((2,), 0.04), rtol=0.01, atol=0
        )
    published = ObjectiveConfig(delta_sigma=100 / 999 * (0.964286 - 0.75))
    assert num_delta_levels(published, level_sigmas(published, shift=3.0)) == 100


@pytest.mark.parametrize("sigma_range", [None, (0.7, 0.95)])
def test_delta_larger_than_the_range_is_refused(sigma_range: tuple[float, float] | None) -> None:
    objective = ObjectiveConfig(sigma_range=sigma_range, delta_sigma=0.3)
    with pytest.raises(ValueError, match=r"objective.delta_sigma 0.3 is larger than the range of sigma, \[0.7"):
        branches(torch.tensor([500]), objective, shift=3.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(kind="constant", start=-0.5), [-0.5, -0.5, -0.5]),
        (Schedule(kind="linear", start=0.1, end=-0.3), [0.1, -0.1, -0.3]),
        (Schedule(kind="cosine", start=-1.0, end=1.0), [-1.0, 0.0, 1.0]),
    ],
)
def test_schedules_run_from_the_least_noisy_level_to_the_noisiest(schedule: Schedule, expected: list[float]) -> None:
    found = schedule_at(schedule, torch.tensor([0, 500, 1000]), num_levels=1001)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-7)


def test_cosine_leaves_and_reaches_slowly() -> None:
    values = schedule_at(Schedule(kind="cosine", start=0.0, end=1.0), torch.arange(1001), num_levels=1001)
    assert (values.diff() > -1e-7).all()
    assert values[100] < 0.03
    assert values[900] > 0.97


@pytest.mark.parametrize("level", [0, 1000, -1])
def test_level_outside_the_training_levels_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=r"level_range"):
        branches(torch.tensor([level]), ObjectiveConfig(), shift=3.0)
