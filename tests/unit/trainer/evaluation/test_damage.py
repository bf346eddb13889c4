"""The damage of good pictures stays below 1, and every way to spoil them raises it above, without a real picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainer.evaluation.damage import THRESHOLDS, changes, damage
from trainer.evaluation.measurements import Measurer

TINY = Path(__file__).resolve().parents[4] / "deploy/tiny/truth"
PROMPTS = tuple(str(index) for index in range(24))


def drawings(style: str) -> Tensor:
    """Real drawings of held-out subjects, (24, 3, 64, 64) uint8."""
    files = sorted((TINY / style).glob("*.webp"))[: len(PROMPTS)]
    return torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files])


def damage_of(change: Callable[[Tensor], Tensor]) -> float:
    images = drawings("3D")
    changed = (change(images.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8)
    measurer = Measurer({}, None, None, num_images_per_prompt=1)
    return measurer.summarize(measurer.measure(changed, PROMPTS, measurer.measure(images, PROMPTS)))["damage"]


def lattice(pixels: Tensor) -> Tensor:
    waves = (torch.arange(64) * np.pi / 4).sin()
    return pixels + 0.2 * waves[:, None] * waves * (pixels.amin(dim=1, keepdim=True) < 0.9)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: F.avg_pool2d(pixels, (7, 1), stride=1, padding=(3, 0), count_include_pad=False),
        lambda pixels: F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False),
        lambda pixels: pixels * torch.tensor([1.0, 0.6, 0.9])[:, None, None],
        lambda pixels: pixels.lerp(torch.tensor(0.9), 0.4),
        lattice,
        lambda pixels: pixels.lerp(pixels.roll(1, dims=0), 0.4),
    ],
    ids=["smeared", "blurred", "tinted", "washed out", "latticed", "blended"],
)
def test_every_spoil_is_damage(spoil: Callable[[Tensor], Tensor]) -> None:
    assert damage_of(spoil) > 1


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels,
        lambda pixels: pixels * 0.98,
        lambda pixels: pixels.lerp(pixels.mean(dim=1, keepdim=True), 0.05),
    ],
    ids=["nothing", "a little darker", "a little paler"],
)
def test_small_changes_are_no_damage(change: Callable[[Tensor], Tensor]) -> None:
    assert damage_of(change) < 1


@pytest.mark.parametrize("seed", range(3))
def test_plain_and_gray_parts_are_no_damage_whatever_their_noise(seed: int) -> None:
    """Sky, fog and margins: their edges and hues are noise."""
    generator = torch.Generator().manual_seed(seed)
    plain = drawings("Flat").float()
    plain[..., :32, :] = 127
    one, other = (
        (plain + torch.randint(-1, 2, plain.shape, generator=generator)).clamp(0, 255).to(torch.uint8) for _ in range(2)
    )
    measurer = Measurer({}, None, None, num_images_per_prompt=1)
    assert measurer.summarize(measurer.measure(other, PROMPTS, measurer.measure(one, PROMPTS)))["damage"] < 0.7


def test_larger_images_are_compared_at_the_size_of_the_thresholds() -> None:
    images = drawings("3D")
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    small = changes(drawings("Flat"), images)
    same = changes(drawings("Flat").repeat_interleave(4, dim=2).repeat_interleave(4, dim=3), large)
    for name in THRESHOLDS.keys() - {"change_lattice"}:  # its period is 16 pixels at any size
        torch.testing.assert_close(same[name], small[name], atol=1e-6, rtol=0)


def test_damage_is_the_largest_share_of_a_threshold() -> None:
    numbers = {name: limit / 4 for name, limit in THRESHOLDS.items()}
    for name, limit in THRESHOLDS.items():
        assert damage(numbers | {name: 3 * limit}) == pytest.approx(3)


def test_thresholds_are_those_that_the_study_found() -> None:
    found = json.loads((TINY.parents[1] / "runs/results/alarms.json").read_text(encoding="utf-8"))
    assert found["thresholds"] == THRESHOLDS
    assert found["unseen_kinds"]["all"]["roc_of_checks"] >= 0.95
