"""Bootstrap intervals agree with those known in closed form."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluation.bootstrap import Interval, draws_of_prompts, interval


def test_a_draw_has_as_many_prompts_as_there_are_some_of_them_again() -> None:
    draws = draws_of_prompts(num_prompts=5, num_draws=20, seed=0)
    assert draws.shape == (20, 5)
    assert (draws.sum(dim=1) == 5).all()
    assert draws.min() == 0
    assert draws.max() > 1, "with replacement"
    assert len(draws.unique(dim=0)) > 1


def test_draws_are_a_function_of_the_seed() -> None:
    first, again, other = (draws_of_prompts(9, 3, seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def means(values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    return draws.double() @ values / len(values)


def test_the_interval_of_a_mean_is_its_value_and_two_standard_errors() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = means(values, draws_of_prompts(400, 2000, seed=0))
    found = interval(float(values.mean()), drawn, confidence=0.95)
    standard_error = float(values.std()) / 400**0.5
    assert found.high - found.value == pytest.approx(1.96 * standard_error, rel=0.1)
    assert found.value - found.low == pytest.approx(1.96 * standard_error, rel=0.1)


def test_the_bias_of_the_draws_is_taken_out() -> None:
    drawn = torch.linspace(-1, 1, 1001) + 50
    found = interval(3.0, drawn, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((2.1, 3.9))


def test_pairing_finds_a_small_difference_that_hard_prompts_hide() -> None:
    base = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    better = base + 0.1 + 0.01 * torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = draws_of_prompts(50, 500, seed=0)
    paired = means(better - base, draws)
    assert interval(0.1, paired, 0.95).excludes_zero
    alone = means(better, draws)
    assert not interval(float(better.mean() - base.mean()), alone, 0.95).excludes_zero


def test_an_interval_knows_whether_zero_lies_in_it() -> None:
    assert Interval(1, 0.5, 2).excludes_zero
    assert Interval(-1, -2, -0.5).excludes_zero
    assert not Interval(0.1, -0.5, 2).excludes_zero
