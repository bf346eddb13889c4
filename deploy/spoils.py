"""Ways to spoil pictures, for `make alarms`: what policies do to please rewards, and other damage.

Each takes pixels (num_images, 3, height, width) in [0, 1] and an amount in [0, 1]. The images of a prompt are
consecutive, REPEATS of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REPEATS = 4
Spoil = Callable[[Tensor, float], Tensor]


def spoil(images: Tensor, way: Spoil, amount: float) -> Tensor:
    """Return uint8 images, spoiled."""
    return (way(images.float() / 255, amount) * 255).round().clamp(0, 255).to(torch.uint8)


def smear(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(F.avg_pool2d(pixels, (11, 1), stride=1, padding=(5, 0), count_include_pad=False), amount)


def tint(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(_colors(pixels), 0.6 * amount * _painted(pixels))


def wash_out(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(torch.full_like(pixels, 0.9), 0.7 * amount)


def blur(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(F.avg_pool2d(pixels, 7, stride=1, padding=3, count_include_pad=False), amount)


def lattice(pixels: Tensor, amount: float) -> Tensor:
    waves = (torch.arange(pixels.shape[-1]) * 2 * math.pi / 8).sin()
    return (pixels + 0.25 * amount * waves[:, None] * waves * _painted(pixels)).clamp(0, 1)


def paint_lower_half(pixels: Tensor, amount: float) -> Tensor:
    lower = (torch.arange(pixels.shape[-2]) >= pixels.shape[-2] // 2).float()[:, None]
    return pixels.lerp(_colors(pixels), 0.9 * amount * _painted(pixels) * lower)


def blend(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(pixels.roll(REPEATS + 1, dims=0), 0.5 * amount)


def add_noise(pixels: Tensor, amount: float) -> Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
    return (pixels + 0.15 * amount * noise).clamp(0, 1)


def pixelate(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp(F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4.0), amount)


def erase_part(pixels: Tensor, amount: float) -> Tensor:
    """Fill the middle with its mean color: a square of a quarter to two fifths of the width."""
    half = round(pixels.shape[-1] * (0.1 + 0.1 * amount))
    middle = slice(pixels.shape[-1] // 2 - half, pixels.shape[-1] // 2 + half)
    erased = pixels.clone()
    erased[..., middle, middle] = pixels[..., middle, middle].mean(dim=(2, 3), keepdim=True)
    return erased


def shift_red(pixels: Tensor, amount: float) -> Tensor:
    shifted = pixels.clone()
    shifted[:, 0] = pixels[:, 0].roll(1 + round(3 * amount), dims=2)
    return shifted


def posterize(pixels: Tensor, amount: float) -> Tensor:
    return pixels.lerp((pixels * 2).round() / 2, amount)


def swirl(pixels: Tensor, amount: float) -> Tensor:
    """Rotate each pixel about the center, by an angle that falls to 0 at the edge."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in pixels.shape[2:]), indexing="ij")
    angle = 1.5 * amount * (1 - (x.square() + y.square()).sqrt()).clamp(min=0)
    grid = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
    return F.grid_sample(pixels, grid.expand(len(pixels), -1, -1, -1), padding_mode="border", align_corners=True)


def displace_lower_half(pixels: Tensor, amount: float) -> Tensor:
    displaced, half = pixels.clone(), pixels.shape[-2] // 2
    displaced[..., half:, :] = pixels[..., half:, :].roll(round(10 * amount), dims=3)
    return displaced


def over_sharpen(pixels: Tensor, amount: float) -> Tensor:
    smooth = F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    return (pixels + 2.5 * amount * (pixels - smooth)).clamp(0, 1)


TUNED: dict[str, Spoil] = {
    "smeared": smear,
    "tinted": tint,
    "washed out": wash_out,
    "blurred": blur,
    "latticed": lattice,
    "lower half in one color": paint_lower_half,
    "half blended with another": blend,
    "noisy": add_noise,
    "pixelated": pixelate,
    "middle erased": erase_part,
    "color fringes": shift_red,
}
UNSEEN: dict[str, Spoil] = {
    "posterized": posterize,
    "swirled": swirl,
    "lower half displaced": displace_lower_half,
    "over-sharpened": over_sharpen,
}


def _painted(pixels: Tensor) -> Tensor:
    return (pixels.amin(dim=1, keepdim=True) < 0.92).float()


def _colors(pixels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(len(pixels), 3, 1, 1, generator=generator).expand_as(pixels)
