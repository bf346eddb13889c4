"""An image goes to the size of its shape, covers it, and loses nothing but what sticks out on two sides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.buckets import Size, fit, nearest_size

SIZES = [(64, 64), (48, 80), (80, 48), (128, 128)]
sides = st.integers(1, 200)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (64, 64)), ((100, 100), (128, 128)), ((30, 50), (48, 80)), ((500, 290), (80, 48)), ((9, 11), (64, 64))],
)
def test_the_nearest_shape_wins_and_then_the_nearest_area(size: Size, expected: Size) -> None:
    assert nearest_size(size, SIZES) == expected


@given(sides, sides)
def test_a_picture_on_its_side_goes_to_the_size_on_its_side(height: int, width: int) -> None:
    near, turned = nearest_size((height, width), SIZES), nearest_size((width, height), SIZES)
    assert turned in (near[::-1], near)  # `near` itself only where two sizes are equally near


@given(sides, sides, st.sampled_from(SIZES))
def test_what_is_fitted_has_the_size_and_stays_in_range(height: int, width: int, size: Size) -> None:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    fitted = fit(pixels, size)
    assert fitted.shape == (3, *size)
    assert fitted.min() >= 0
    assert fitted.max() <= 1


def test_a_picture_of_the_size_is_left_as_it_is() -> None:
    pixels = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    torch.testing.assert_close(fit(pixels, (48, 80)), pixels / 255)


def test_the_middle_is_kept() -> None:
    pixels = torch.zeros(3, 32, 96, dtype=torch.uint8)
    pixels[:, :, 32:64] = 255
    assert fit(pixels, (32, 32)).equal(torch.ones(3, 32, 32))
    assert fit(pixels.transpose(1, 2), (32, 32)).equal(torch.ones(3, 32, 32))
