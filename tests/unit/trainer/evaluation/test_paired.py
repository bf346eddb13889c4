"""Paired measures: the same drawing is right, each way to spoil it shows in the measure that is for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluation.paired import PAIRED, aligned_l1, gap_closed, paired_values

SIZE_PX = 64


@pytest.fixture(scope="module")
def real() -> Tensor:
    """Four drawings: a colored disk with two dark eyes on white."""
    y, x = torch.meshgrid(torch.arange(SIZE_PX), torch.arange(SIZE_PX), indexing="ij")
    colors = torch.tensor([[255, 200, 40], [240, 60, 60], [60, 180, 80], [70, 90, 230]], dtype=torch.uint8)
    pictures = torch.full((4, 3, SIZE_PX, SIZE_PX), 255, dtype=torch.uint8)
    disk = (x - 32) ** 2 + (y - 32) ** 2 < 26**2
    for picture, color in zip(pictures, colors, strict=True):
        picture[:, disk] = color[:, None]
    for left in (22, 42):
        pictures[:, :, (x - left) ** 2 + (y - 26) ** 2 < 16] = 30
    return pictures


def as_bytes(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).round().to(torch.uint8)


def blurred(pictures: Tensor) -> Tensor:
    return as_bytes(F.avg_pool2d(F.pad(pictures.float(), (4, 4, 4, 4), mode="replicate"), 9, stride=1))


def tinted(pictures: Tensor) -> Tensor:
    """Lay half of magenta on what is painted."""
    painted = (pictures.amin(dim=1, keepdim=True) < 250).float()
    magenta = torch.tensor([255.0, 0.0, 255.0]).view(1, 3, 1, 1)
    return as_bytes(pictures + painted * 0.5 * (magenta - pictures))


def washed_out(pictures: Tensor) -> Tensor:
    return as_bytes(pictures * 0.4 + 0.6 * 204)


def without_eyes(pictures: Tensor) -> Tensor:
    return torch.where((pictures == 30).all(dim=1, keepdim=True), pictures[:, :, 50:51, 32:33], pictures)


def noisy(pictures: Tensor) -> Tensor:
    return as_bytes(pictures + 40 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)))


def test_the_same_drawing_is_right_in_every_measure(real: Tensor) -> None:
    values = paired_values(real, real)
    assert tuple(values) == PAIRED
    right = {"truth_l1": 0.0, "truth_hue_distance": 0.0}
    for name, value in values.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, torch.full((4,), right.get(name, 1.0), dtype=torch.float64), msg=name)


@pytest.mark.parametrize(
    ("spoil", "name", "low", "high"),
    [
        (blurred, "truth_sharpness_ratio", 0.0, 0.7),
        (blurred, "truth_edge_correlation", -1.0, 0.8),
        (blurred, "truth_ssim", -1.0, 0.9),
        (tinted, "truth_hue_distance", 0.05, 1.0),
        (tinted, "truth_l1", 0.05, 1.0),
        (washed_out, "truth_contrast_ratio", 0.0, 0.6),
        (without_eyes, "truth_edge_correlation", -1.0, 0.97),
        (without_eyes, "truth_ssim", -1.0, 0.99),
        (noisy, "truth_sharpness_ratio", 1.05, 100.0),
        (noisy, "truth_ssim", -1.0, 0.5),
    ],
)
def test_a_spoiled_drawing_shows(
    real: Tensor, spoil: Callable[[Tensor], Tensor], name: str, low: float, high: float
) -> None:
    values = paired_values(spoil(real), real)[name]
    assert ((low <= values) & (values <= high)).all(), values


def test_a_small_shift_is_forgiven_and_a_large_one_is_not(real: Tensor) -> None:
    pixels = real.double() / 255
    assert aligned_l1(pixels.roll((2, -1), dims=(2, 3)), pixels).max() == 0
    assert aligned_l1(pixels.roll((0, 8), dims=(2, 3)), pixels).min() > 0.02


def test_measures_of_one_color_are_finite() -> None:
    plain = torch.full((2, 3, SIZE_PX, SIZE_PX), 128, dtype=torch.uint8)
    assert all(value.isfinite().all() for value in paired_values(plain, plain).values())


def test_each_image_is_measured_alone(real: Tensor) -> None:
    images = blurred(real)
    together = paired_values(images, real)
    for index in range(len(real)):
        alone = paired_values(images[index : index + 1], real[index : index + 1])
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name][index : index + 1], msg=name)


def test_images_of_another_size_are_refused(real: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images are \(4, 3, 32, 64\), but their real pictures \(4, 3, 64, 64\)"):
        paired_values(real[:, :, :32], real)


def test_the_gap_is_0_at_the_base_and_1_at_the_oracle() -> None:
    base, oracle = torch.tensor([0.12, 0.6]), torch.tensor([0.06, 0.9])
    torch.testing.assert_close(gap_closed(base, base, oracle), torch.zeros(2))
    torch.testing.assert_close(gap_closed(base, oracle, oracle), torch.ones(2))
    torch.testing.assert_close(gap_closed(base, (base + oracle) / 2, oracle), torch.full((2,), 0.5))
    assert gap_closed(base, oracle, base).isnan().all()
