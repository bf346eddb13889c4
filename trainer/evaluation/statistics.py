"""Compute statistics of images that reveal reward hacking, such as saturation and diversity: one pure formula each.

A policy can please a reward by a tint, by contrast, or by repeating one image. These statistics depend neither on the
reward nor on the words. Tensors in, tensors out; each formula has its source, if there is one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DARK = 0.2  # a pixel with luma below this is dark
_EDGE = 0.1  # a pixel where luma changes by this much per pixel, or more, is an edge
_COLOR_LEVELS = 4  # per channel: 64 colors
_GRAY_LEVELS, _WINDOW_PX = 8, 8  # of local_entropy
_CELLS = 4  # rows and columns of the fixed features
_TILE_PX = 16  # a token's width and height in FLUX: 8 of the VAE × 2 of the patch; twice the embedded model's
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def picture_statistics(images: Tensor) -> dict[str, Tensor]:
    """Return statistics (num_images,) float64 by name, of images (num_images, 3, height, width) uint8.

    saturation: mean over pixels of (max − min) / max of the channels, 0 for black (HSV; Smith 1978); in [0, 1].
    dark_share: share of pixels with luma below 0.2.
    edge_density: share of pixels where luma changes by 0.1 per pixel or more (Sobel's operator).
    color_entropy: −Σ p log2 p over 64 colors, 4 levels per channel, in bits; at most 6.
    lattice_share: share of luma's variance that repeats every 16 pixels, a token's size in FLUX (or twice a smaller
    one); in [0, 1], 0 for a single color. Over-optimized rewards favor such a lattice, which people see and judges
    often do not.
    contrast: standard deviation of luma over pixels; it falls as images wash out.
    sharpness: root mean square of the change of luma per pixel (Sobel's operator); it falls as images blur.
    local_entropy: −Σ p log2 p over 8 levels of luma, in bits, mean over windows of 8 × 8 pixels; it falls as areas run
    into one color and rises with noise.
    """
    pixels = images.double() / 255
    gray, edges = luma(pixels), edge_strength(pixels)
    brightest, darkest = pixels.amax(dim=1), pixels.amin(dim=1)
    saturation = torch.where(brightest > 0, (brightest - darkest) / brightest.clamp(min=1e-9), 0.0)
    return {
        "saturation": saturation.mean(dim=(1, 2)),
        "dark_share": (gray < _DARK).double().mean(dim=(1, 2)),
        "edge_density": (edges >= _EDGE).double().mean(dim=(1, 2)),
        "color_entropy": _color_entropy(images),
        "lattice_share": _lattice_share(gray),
        "contrast": gray.flatten(1).std(dim=1, correction=0),
        "sharpness": edges.square().mean(dim=(1, 2)).sqrt(),
        "local_entropy": _local_entropy(gray),
    }


def picture_features(images: Tensor) -> Tensor:
    """Return features (num_images, 64) without a network: mean color and mean edge strength in 4 × 4 cells.

    They replace a judge's features in a run without judges. They show color, layout and contrast, not content.
    """
    pixels = images.double() / 255
    layers = torch.cat([pixels, edge_strength(pixels)[:, None]], dim=1)
    return F.adaptive_avg_pool2d(layers, _CELLS).flatten(1)


def distances(features: Tensor) -> Tensor:
    """Return the Euclidean distances (…, n, n) of all pairs of features within each set (…, n, d)."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def diversity(features: Tensor) -> Tensor:
    """Return the mean Euclidean distance (…) of all pairs of features within each set (…, n, d).

    Raises ValueError if n < 2.
    """
    num = features.shape[-2]
    if num < 2:
        raise ValueError(f"{num} picture has no diversity: two or more are needed")
    return distances(features).sum(dim=(-2, -1)) / (num * (num - 1))


def pixel_distance(images: Tensor, base: Tensor) -> Tensor:
    """Return the mean absolute difference (num_images,) of pixels in [0, 1].

    images, base: uint8, drawn for the same prompts and seeds.
    """
    return (images.double() - base.double()).abs().mean(dim=(1, 2, 3)) / 255


def feature_distance(features: Tensor, base: Tensor) -> Tensor:
    """Return the Euclidean distance (num_images,) of features (num_images, d) to those of the base model's images."""
    return (features - base).norm(dim=1)


def common_mode(positive: Tensor, negative: Tensor) -> Tensor:
    """Return (positive + negative) / 2, (num_images,), which the relative reward positive − negative does not see.

    If it rises above the base model's, the images please the reward model whatever the words.
    """
    return (positive + negative) / 2


def luma(pixels: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", pixels, pixels.new_tensor(_LUMA))


def _lattice_share(luma: Tensor) -> Tensor:
    """Return the variance of the mean 16 × 16 tile over that of all pixels, (n,), of luma (n, height, width).

    By Parseval's theorem it is the share of the spectrum's power, without the mean, at the multiples of 1 / 16 pixel.
    Rows and columns beyond whole tiles are cut.
    """
    height, width = (min(_TILE_PX, size) for size in luma.shape[1:])
    rows, columns = (size - size % _TILE_PX or size for size in luma.shape[1:])
    tiles = luma[:, :rows, :columns].unflatten(2, (-1, width)).unflatten(1, (-1, height))
    repeated, whole = tiles.mean(dim=(1, 3)).flatten(1), tiles.flatten(1)
    return repeated.var(dim=1, correction=0) / whole.var(dim=1, correction=0).clamp(min=1e-9)


def edge_strength(pixels: Tensor) -> Tensor:
    """Return the change of luma per pixel (num_images, height, width): Sobel's operator / 8, borders repeated."""
    across = pixels.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    slopes = F.conv2d(F.pad(luma(pixels)[:, None], (1, 1, 1, 1), mode="replicate"), kernels)
    return slopes.norm(dim=1)


def _local_entropy(gray: Tensor) -> Tensor:
    """Return the mean over windows of the entropy of luma's levels, (n,), of luma (n, height, width)."""
    levels = (gray * _GRAY_LEVELS).long().clamp(max=_GRAY_LEVELS - 1)[:, None]
    size = [min(_WINDOW_PX, side) for side in gray.shape[1:]]
    stride = [max(1, side // 2) for side in size]
    shares = [F.avg_pool2d((levels == level).double(), size, stride) for level in range(_GRAY_LEVELS)]
    entropy = torch.special.entr(torch.cat(shares, dim=1)).sum(dim=1).mean(dim=(1, 2))
    return entropy / torch.log(torch.tensor(2.0, dtype=torch.float64))


def _color_entropy(images: Tensor) -> Tensor:
    levels = images.long() * _COLOR_LEVELS // 256
    colors = (levels[:, 0] * _COLOR_LEVELS + levels[:, 1]) * _COLOR_LEVELS + levels[:, 2]
    counts = torch.stack([each.bincount(minlength=_COLOR_LEVELS**3) for each in colors.flatten(1)]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
