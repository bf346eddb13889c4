"""Statistics of images whose numbers are known, such as flat colors and lattices, and properties of the distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.evaluation.statistics import (
    common_mode,
    diversity,
    feature_distance,
    picture_features,
    picture_statistics,
    pixel_distance,
)


def flat(*colors: tuple[int, int, int], size: int = 8) -> Tensor:
    return torch.tensor(colors, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, size, size).contiguous()


def noise(num_images: int = 4) -> Tensor:
    return torch.randint(0, 256, (num_images, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_saturation_is_that_of_hsv() -> None:
    images = flat((255, 0, 0), (200, 100, 100), (90, 90, 90), (0, 0, 0))
    assert picture_statistics(images)["saturation"].tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_dark_share_counts_pixels_below_a_fifth_of_white() -> None:
    images = flat((255, 255, 255), (0, 0, 0), (50, 50, 50), (52, 52, 52))
    images[0, :, :2] = 0
    assert picture_statistics(images)["dark_share"].tolist() == [0.25, 1.0, 1.0, 0.0]


def test_edges_are_where_luma_changes() -> None:
    images = flat((0, 0, 0), (128, 128, 128), (0, 0, 0))
    images[0, :, :, 4:] = 255  # one step: seen by the pixels on both sides of it
    images[2, :, 3:] = 20  # too weak
    assert picture_statistics(images)["edge_density"].tolist() == [2 / 8, 0.0, 0.0]


def test_color_entropy_is_the_logarithm_of_equally_frequent_colors() -> None:
    images = flat((0, 0, 0), (0, 0, 0), (10, 20, 30))
    images[1, :, :, 4:] = 255
    assert picture_statistics(images)["color_entropy"].tolist() == pytest.approx([0.0, 1.0, 0.0])
    values = torch.tensor([0, 64, 128, 192], dtype=torch.uint8)
    every_color = torch.cartesian_prod(values, values, values).T.reshape(1, 3, 8, 8)
    assert picture_statistics(every_color)["color_entropy"].item() == pytest.approx(6.0)


def test_a_larger_copy_has_the_same_colors_and_the_same_share_of_dark() -> None:
    images = noise()
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for name in ("saturation", "dark_share", "color_entropy"):
        torch.testing.assert_close(picture_statistics(large)[name], picture_statistics(images)[name])


def test_contrast_sharpness_and_local_entropy_fall_as_an_image_blurs_or_washes_out() -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    blurred = torch.nn.functional.avg_pool2d(images.float(), 9, stride=1, padding=4).to(torch.uint8)
    washed_out = (images * 0.3 + 0.7 * 220).to(torch.uint8)
    plain = picture_statistics(images)
    for spoiled in (blurred, washed_out):
        for name in ("contrast", "sharpness", "local_entropy"):
            assert (picture_statistics(spoiled)[name] < 0.8 * plain[name]).all(), name
    assert picture_statistics(flat((9, 9, 9), size=64))["local_entropy"].item() == 0
    halves = flat((0, 0, 0), size=8)
    halves[:, :, :, 4:] = 255
    assert picture_statistics(halves)["local_entropy"].item() == pytest.approx(1.0)
    assert picture_statistics(halves)["contrast"].item() == pytest.approx(0.5)


def test_lattice_share_is_the_power_at_the_multiples_of_a_tokens_frequency() -> None:
    images = torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[1] = images[1, :, :16, :16].repeat(1, 4, 3)
    luma = torch.einsum("nchw,c->nhw", images.double() / 255, torch.tensor([0.299, 0.587, 0.114]).double())
    power = torch.fft.fft2(luma).abs() ** 2
    power[:, 0, 0] = 0
    expected = power[:, ::4, ::3].sum(dim=(1, 2)) / power.sum(dim=(1, 2))
    torch.testing.assert_close(picture_statistics(images)["lattice_share"], expected)
    assert expected[1] == pytest.approx(1.0)
    assert picture_statistics(flat((9, 9, 9), size=64))["lattice_share"].item() == pytest.approx(0.0)


def test_fixed_features_are_the_mean_colors_of_cells_and_see_layout() -> None:
    image = flat((255, 0, 0))
    features = picture_features(image)
    assert features.shape == (1, 64)
    assert features[0, :16].tolist() == [1.0] * 16
    assert features[0, 16:].abs().max() < 1e-12
    turned = noise().flip(2)
    assert feature_distance(picture_features(turned), picture_features(noise())).min() > 0.1


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert diversity(corners).item() == pytest.approx((3 + 4 + 5) / 3)
    assert diversity(torch.stack([corners, torch.zeros(3, 2)])).tolist() == pytest.approx([4.0, 0.0])
    with pytest.raises(ValueError, match="two or more"):
        diversity(corners[:1])


def test_one_and_the_same_picture_has_no_diversity() -> None:
    assert diversity(picture_features(noise(1).expand(5, -1, -1, -1))).item() == pytest.approx(0, abs=1e-9)
    assert diversity(picture_features(noise(5))).item() > 0.1


def test_distances_to_the_base_are_zero_for_it_and_one_from_black_to_white() -> None:
    assert pixel_distance(noise(), noise()).tolist() == [0.0] * 4
    assert pixel_distance(flat((0, 0, 0)), flat((255, 255, 255))).item() == 1.0
    assert pixel_distance(flat((255, 0, 0)), flat((0, 0, 0))).item() == pytest.approx(1 / 3)
    assert feature_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item() == 5.0


def test_common_mode_is_what_the_difference_does_not_see() -> None:
    positive, negative, drift = torch.tensor([0.3, 0.2]), torch.tensor([0.1, 0.4]), torch.tensor([0.05, 0.2])
    raised = common_mode(positive + drift, negative + drift) - common_mode(positive, negative)
    torch.testing.assert_close(raised, drift)
    assert common_mode(negative, positive).equal(common_mode(positive, negative))


@pytest.mark.parametrize("name", ["saturation", "dark_share", "edge_density", "color_entropy", "lattice_share"])
def test_statistics_are_finite_one_an_image_and_within_their_bounds(name: str) -> None:
    values = picture_statistics(torch.cat([noise(), noise().clamp(max=3), noise().clamp(min=250)]))[name]
    assert values.shape == (12,)
    assert all(math.isfinite(value) and 0 <= value <= 6 for value in values.tolist())
    assert name == "color_entropy" or values.max() <= 1
