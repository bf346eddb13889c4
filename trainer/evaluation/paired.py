"""Compare images with the real picture of the same prompt, one to one: what a person sees and no distribution shows.

A share or a Fréchet distance can improve while eyes dissolve. The distance to the real picture of the same subject in
the wanted style cannot. Tensors in, tensors out: images and truth are (num_images, 3, height, width) uint8, values
(num_images,) float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.evaluation.statistics import edge_strength, luma

_MAX_SHIFT_PX = 2  # of an image against its truth, before they are compared
_LARGEST_RATIO = 100.0
_COMPARED_PX = 256  # larger images are averaged down to it: SSIM of 1024 pixels takes 5 GB an image
_BATCH_PIXELS = 32 * 64**2  # compared at a time
GAP_MEASURES = ("truth_l1", "truth_edge_correlation", "truth_ssim", "truth_hue_distance")  # better in one direction
GAPS = tuple(name.replace("truth", "gap_closed", 1) for name in GAP_MEASURES)
PAIRED = (
    "truth_l1", "truth_edge_correlation", "truth_ssim", "truth_contrast_ratio", "truth_sharpness_ratio",
    "truth_hue_distance",
)  # fmt: skip


def paired_values(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return how far each image is from its truth, by metric name.

    truth_l1: mean absolute difference of pixels in [0, 1], at the best of all shifts by up to 2 pixels.
    truth_edge_correlation: Pearson's correlation of edge strengths (Sobel) over pixels; 1 for the same drawing.
    truth_ssim: structural similarity (Wang et al. 2004, torchmetrics); 1 for the same image.
    truth_contrast_ratio: standard deviation of luma over the truth's; 1 is right.
    truth_sharpness_ratio: root mean square of edge strength over the truth's; below 1 is blurred, above 1 is noisy.
    truth_hue_distance: mean angle between hues in [0, 1], 1 for complementary colors, weighted by the chroma of both.

    Images whose longer side has more than 256 pixels are averaged down to it first. Raises ValueError if the shapes
    differ.
    """
    if images.shape != truth.shape:
        raise ValueError(f"images are {tuple(images.shape)}, but their real pictures {tuple(truth.shape)}")
    images, truth = _reduced(images), _reduced(truth)
    batch = max(1, _BATCH_PIXELS // (images.shape[2] * images.shape[3]))
    parts = [_values_of_batch(*pair) for pair in zip(images.split(batch), truth.split(batch), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in PAIRED}


def _reduced(images: Tensor) -> Tensor:
    factor = _COMPARED_PX / max(images.shape[2:])
    if factor >= 1:
        return images
    size = [max(1, round(each * factor)) for each in images.shape[2:]]
    return torch.cat([F.interpolate(each[None].float(), size, mode="area") for each in images]).round().to(torch.uint8)


def _values_of_batch(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    from torchmetrics.functional.image import structural_similarity_index_measure  # on use: it takes 4 s to import

    pixels, real = images.double() / 255, truth.double() / 255
    edges, real_edges = edge_strength(pixels), edge_strength(real)
    ssim = structural_similarity_index_measure(pixels, real, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return {
        "truth_l1": aligned_l1(pixels, real),
        "truth_edge_correlation": correlation(edges, real_edges),
        "truth_ssim": ssim,
        "truth_contrast_ratio": _ratio(luma(pixels).flatten(1).std(dim=1), luma(real).flatten(1).std(dim=1)),
        "truth_sharpness_ratio": _ratio(*(each.square().mean(dim=(1, 2)).sqrt() for each in (edges, real_edges))),
        "truth_hue_distance": hue_distance(pixels, real),
    }


def aligned_l1(pixels: Tensor, real: Tensor, max_shift_px: int = _MAX_SHIFT_PX) -> Tensor:
    """Return the mean absolute difference (num_images,) at the best shift of the image by up to max_shift_px.

    Only pixels that both have after every shift are compared, the same ones for all shifts.
    """
    height, width = pixels.shape[2:]
    inner = (..., slice(max_shift_px, height - max_shift_px), slice(max_shift_px, width - max_shift_px))
    shifts = range(-max_shift_px, max_shift_px + 1)
    distances = [
        (pixels.roll((down, right), dims=(2, 3))[inner] - real[inner]).abs().mean(dim=(1, 2, 3))
        for down, right in product(shifts, shifts)
    ]
    return torch.stack(distances).amin(dim=0)


def correlation(values: Tensor, others: Tensor) -> Tensor:
    """Return Pearson's correlation (num_images,) over all numbers of each image; 0 if one of them is constant."""
    centered, centered_others = (each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in (values, others))
    return F.cosine_similarity(centered, centered_others, dim=1, eps=1e-9)


def hue_distance(pixels: Tensor, real: Tensor) -> Tensor:
    """Return the mean angle between hues over π, (num_images,), weighted by the product of the pixels' chromas.

    Hue and chroma are those of the plane of color differences (α, β): α = R − (G + B) / 2, β = √3 / 2 · (G − B). Two
    images without a pixel that is colored in both have the distance 0.
    """
    plane, real_plane = color_plane(pixels), color_plane(real)
    weight = plane.norm(dim=1) * real_plane.norm(dim=1)
    cosine = F.cosine_similarity(plane, real_plane, dim=1, eps=1e-9).clamp(-1, 1)
    angles = cosine.acos() / math.pi
    return (angles * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-9)


def gap_closed(base: Tensor, run: Tensor, oracle: Tensor) -> Tensor:
    """Return where a run stands between base (0) and oracle (1): (base − run) / (base − oracle), elementwise.

    The three are means of one measure, such as truth_l1, over the same prompts. Where base and oracle are the same
    there is no gap: the result is NaN.
    """
    gap = base - oracle
    return torch.where(gap == 0, math.nan, (base - run) / gap)


def gaps_closed(
    base: Mapping[str, Tensor], run: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return gap_closed by measure, as gap_closed_l1 of truth_l1, for those of GAP_MEASURES that `base` has.

    A measure without a gap between base and oracle is left out.
    """
    gaps = {
        gap: gap_closed(base[name], run[name], oracle[name])
        for gap, name in zip(GAPS, GAP_MEASURES, strict=True)
        if name in base
    }
    return {name: gap for name, gap in gaps.items() if gap.isfinite().all()}


def color_plane(pixels: Tensor) -> Tensor:
    """Return (num_images, 2, height, width)."""
    red, green, blue = pixels.unbind(dim=1)
    return torch.stack([red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)], dim=1)


def _ratio(value: Tensor, real: Tensor) -> Tensor:
    return (value / real.clamp(min=1e-9)).clamp(max=_LARGEST_RATIO)
