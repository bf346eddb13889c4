"""Tell damage from a change of style without real pictures: how far images moved from the base model's, in one number.

A change of style moves contrast, sharpness, hue and edges a little; smearing, tinting, washing out, blurring, lattices
and blends move one of them a lot. `damage` is the largest of these changes as a share of its threshold: above 1 it is
more than a change of style. The thresholds were found by `make alarms` on the embedded default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluation.paired import color_plane
from trainer.evaluation.statistics import edge_strength, luma, picture_statistics

_SIZE_PX = 64  # of the images on which the thresholds were found
_PLAIN, _PLAIN_EDGES, _GRAY = 1e-3, 1e-4, 1e-3  # below these, contrast and detail, edges, and chroma count little
# of the mean change over images, of the same prompts and noise; `make alarms` finds them
THRESHOLDS = {
    "change_contrast": 0.13,
    "change_sharpness": 0.17,
    "change_local_entropy": 0.13,
    "change_lattice": 0.007,
    "change_edges": 0.27,
    "change_hue": 0.086,
    "change_color": 0.058,
    "change_detail": 0.21,
}


def changes(images: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Return how far each image moved from the base model's, (num_images,), by the names of THRESHOLDS.

    images, base: (num_images, 3, height, width) uint8. All but the lattice are compared at 64 pixels, to which larger
    images are averaged down. Edges and hue are compared in nine windows of half the height and width, and the window
    that moved most counts: damage is often local.

    change_contrast, change_sharpness, change_detail: the logarithm of the ratio of contrast, of sharpness
    (picture_statistics), of the mean |∇²| of luma. change_local_entropy, change_lattice: the difference. change_edges:
    1 − the correlation of edge strengths. change_hue: the hue distance. change_color: the distance of the mean colors,
    without brightness. Plain gray or constant windows count little, whatever their noise.
    """
    small, small_base = _small(images), _small(base)
    before, after = picture_statistics(small_base), picture_statistics(small)
    lattices = [picture_statistics(each)["lattice_share"] for each in (images, base)]
    pixels, base_pixels = small.double() / 255, small_base.double() / 255
    windows = list(zip(_windows(pixels), _windows(base_pixels), strict=True))
    mean_colors = [color_plane(each).mean(dim=(2, 3)) for each in (pixels, base_pixels)]
    return {
        "change_contrast": _log_ratio(after["contrast"], before["contrast"]),
        "change_sharpness": _log_ratio(after["sharpness"], before["sharpness"]),
        "change_local_entropy": (after["local_entropy"] - before["local_entropy"]).abs(),
        "change_lattice": (lattices[0] - lattices[1]).abs(),
        "change_edges": torch.stack([_edge_change(*parts) for parts in windows]).amax(dim=0),
        "change_hue": torch.stack([_hue_change(*parts) for parts in windows]).amax(dim=0),
        "change_color": (mean_colors[0] - mean_colors[1]).norm(dim=1),
        "change_detail": _log_ratio(_detail(pixels), _detail(base_pixels)),
    }


def damage(numbers: Mapping[str, float], thresholds: Mapping[str, float] = THRESHOLDS) -> float:
    """Return the largest of the mean changes as a share of its threshold; above 1 images are damaged.

    >>> damage({name: limit / 2 for name, limit in THRESHOLDS.items()})
    0.5
    """
    return max(numbers[name] / limit for name, limit in thresholds.items())


def _small(images: Tensor) -> Tensor:
    """Average images down until the shorter side has 64 pixels; smaller ones stay."""
    factor = _SIZE_PX / min(images.shape[2:])
    if factor >= 1:
        return images
    size = [round(each * factor) for each in images.shape[2:]]
    return torch.cat([F.interpolate(each[None].float(), size, mode="area") for each in images]).round().to(torch.uint8)


def _windows(pixels: Tensor) -> list[Tensor]:
    """Return nine overlapping windows of half the height and width."""
    height, width = (size // 2 for size in pixels.shape[2:])
    return [
        pixels[..., top : top + height, left : left + width]
        for top in (0, height // 2, height)
        for left in (0, width // 2, width)
    ]


def _edge_change(pixels: Tensor, base: Tensor) -> Tensor:
    """Return 1 − (covariance + c) / (product of deviations + c) of edge strengths, as SSIM does it."""
    edges, base_edges = (edge_strength(each).flatten(1) for each in (pixels, base))
    centered, base_centered = (each - each.mean(dim=1, keepdim=True) for each in (edges, base_edges))
    covariance = (centered * base_centered).mean(dim=1)
    deviations = centered.square().mean(dim=1).sqrt() * base_centered.square().mean(dim=1).sqrt()
    return 1 - (covariance + _PLAIN_EDGES) / (deviations + _PLAIN_EDGES)


def _hue_change(pixels: Tensor, base: Tensor) -> Tensor:
    """Return the mean angle between hues over π, weighted by the product of chromas and by c of no change."""
    plane, base_plane = color_plane(pixels), color_plane(base)
    weight = plane.norm(dim=1) * base_plane.norm(dim=1)
    angles = F.cosine_similarity(plane, base_plane, dim=1, eps=1e-9).clamp(-1, 1).acos() / math.pi
    return (angles * weight).mean(dim=(1, 2)) / (weight.mean(dim=(1, 2)) + _GRAY)


def _detail(pixels: Tensor) -> Tensor:
    """Return the mean |∇²| of luma, (num_images,)."""
    kernel = pixels.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma(pixels)[:, None], kernel).abs().mean(dim=(1, 2, 3))


def _log_ratio(values: Tensor, base: Tensor) -> Tensor:
    return ((values + _PLAIN) / (base + _PLAIN)).log().abs()
