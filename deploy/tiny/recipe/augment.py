"""Change batches of pictures on their device: other colors and places, and the ways in which policies spoil pictures.

Pictures are (batch, 3, height, width) in [-1, 1], 1 being white.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flip(pictures: Tensor) -> Tensor:
    """Mirror half of the pictures."""
    return torch.where(_some(pictures, 0.5), pictures.flip(3), pictures)


def recolor(pictures: Tensor, share: float) -> Tensor:
    """Turn the hue of some pictures by any angle, as a rotation about the gray axis; white and gray stay."""
    angle = torch.rand(len(pictures), device=pictures.device) * 2 * math.pi
    cos, sin = angle.cos(), angle.sin()
    diagonal = (1 + 2 * cos) / 3
    plus, minus = (1 - cos) / 3 + sin / math.sqrt(3), (1 - cos) / 3 - sin / math.sqrt(3)
    rows = torch.stack([diagonal, minus, plus, plus, diagonal, minus, minus, plus, diagonal], 1).view(-1, 3, 3)
    turned = torch.einsum("bij,bjhw->bihw", rows, pictures).clamp(-1, 1)
    return torch.where(_some(pictures, share), turned, pictures)


def cast_color(pictures: Tensor, share: float, strength: float = 0.25) -> Tensor:
    """Darken each channel of some pictures by up to `strength`, as a colored lamp does, white as well."""
    gain = 1 - strength * torch.rand(len(pictures), 3, 1, 1, device=pictures.device)
    return torch.where(_some(pictures, share), (pictures + 1) * gain - 1, pictures)


def change_light(pictures: Tensor, share: float) -> Tensor:
    """Change brightness, contrast and saturation of some pictures by up to a fifth."""
    amounts = 1 + 0.4 * (torch.rand(len(pictures), 3, 1, 1, device=pictures.device) - 0.5)
    gray = pictures.mean(dim=1, keepdim=True)
    changed = gray + (pictures - gray) * amounts[:, :1]
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = (mean + (changed - mean) * amounts[:, 1:2] + 1) * amounts[:, 2:] - 1
    return torch.where(_some(pictures, share), changed.clamp(-1, 1), pictures)


def move(pictures: Tensor, share: float, degrees: float = 12.0, shift: float = 0.08) -> Tensor:
    """Rotate, scale and shift some pictures a little; what comes in from outside is white."""
    count, device = len(pictures), pictures.device
    angle = (torch.rand(count, device=device) * 2 - 1) * math.radians(degrees)
    scale = 0.9 + 0.35 * torch.rand(count, device=device)
    place = (torch.rand(count, 2, device=device) * 2 - 1) * 2 * shift
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, place[:, 0], sin, cos, place[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures - 1, grid, align_corners=False) + 1
    return torch.where(_some(pictures, share), moved, pictures)


def jitter(pictures: Tensor) -> Tensor:
    """Change what a style must not hang on: side, tint, light, place."""
    return move(change_light(flip(pictures), 0.6), 0.4)


def paste(pictures: Tensor, others: Tensor, share: float) -> Tensor:
    """Paste into some pictures a box of another picture, a quarter to three quarters of the width and height.

    CutMix (Yun et al., arXiv 1905.04899); if both have one label, so has the result.
    """
    count, (height, width), device = len(pictures), pictures.shape[2:], pictures.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    is_inside = torch.ones(count, 1, height, width, dtype=torch.bool, device=device)
    for place, size in ((y, height), (x, width)):
        length = size * (0.25 + 0.5 * torch.rand(count, 1, 1, 1, device=device))
        start = (size - length) * torch.rand(count, 1, 1, 1, device=device)
        is_inside &= (place >= start) & (place < start + length)
    return torch.where(_some(pictures, share) & is_inside, others, pictures)


def blur(pictures: Tensor, radius: int, vertical: bool | None = None) -> Tensor:
    """Average over 2·radius + 1 pixels along one axis, or along both if `vertical` is None."""
    for axis in (2, 3) if vertical is None else (2 if vertical else 3,):
        size = 2 * radius + 1
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = F.pad(pictures, pad, mode="replicate")
        pictures = F.avg_pool2d(padded, (size, 1) if axis == 2 else (1, size), stride=1)
    return pictures


def spoil(pictures: Tensor) -> Tensor:
    """Spoil each picture in one of seven ways in which policies please rewards, drawn at random."""
    count, device = len(pictures), pictures.device
    kind = torch.randint(7, (count, 1, 1, 1), device=device)
    amount = 0.35 + 0.65 * torch.rand(count, 1, 1, 1, device=device)
    tint = torch.rand(count, 3, 1, 1, device=device) * 2 - 1
    y, x = torch.meshgrid(*(torch.arange(size, device=device) for size in pictures.shape[2:]), indexing="ij")
    period = 4 * 2 ** torch.randint(3, (count, 1, 1, 1), device=device)
    lattice = (2 * math.pi * x / period).sin() * (2 * math.pi * y / period).sin()
    lower = (y > y.max() * (0.35 + 0.3 * torch.rand(count, 1, 1, 1, device=device))).float()
    painted = (pictures.amin(dim=1, keepdim=True) < 0.85).float()
    ways = [
        pictures.lerp(blur(pictures, 5, vertical=True), amount),  # smeared
        pictures.lerp(blur(pictures, 3), amount),  # blurred
        pictures.lerp(tint.expand_as(pictures), 0.6 * amount * painted),  # tinted
        pictures.lerp(tint.expand_as(pictures), 0.9 * amount * painted * lower),  # lower half in one color
        pictures.lerp(torch.full_like(pictures, 0.8), 0.7 * amount),  # washed out
        (pictures + 0.5 * amount * lattice * painted).clamp(-1, 1),  # latticed
        pictures.lerp(pictures.roll(1, dims=0), 0.5 * amount),  # half blended with another
    ]
    spoiled = pictures
    for number, way in enumerate(ways):
        spoiled = torch.where(kind == number, way, spoiled)
    return spoiled


def _some(pictures: Tensor, share: float) -> Tensor:
    return torch.rand(len(pictures), 1, 1, 1, device=pictures.device) < share
