"""Choose an image's size and bring it to that. Pure. A bucket is all images of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height_px, width_px


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the one of `sizes` whose height/width is nearest as a ratio; of equal shapes the one nearest in area.

    >>> nearest_size((600, 400), [(512, 512), (640, 448), (1280, 896)])
    (640, 448)
    """
    height, width = size

    def distance(other: Size) -> tuple[float, float]:
        shape = math.log(height / width) - math.log(other[0] / other[1])
        area = math.log(height * width) - math.log(other[0] * other[1])
        return round(abs(shape), 9), abs(area)  # rounded, so that equal shapes of other sizes are equal

    return min(sizes, key=distance)


def fit(pixels: Tensor, size: Size) -> Tensor:
    """Resize an image (3, height, width) uint8 to cover `size`, crop its center: return (3, *size) in [0, 1]."""
    factor = max(wanted / side for wanted, side in zip(size, pixels.shape[1:], strict=True))
    covering = [max(wanted, round(factor * side)) for wanted, side in zip(size, pixels.shape[1:], strict=True)]
    floats = pixels[None].float() / 255
    resized = F.interpolate(floats, size=covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - wanted) // 2 for side, wanted in zip(covering, size, strict=True))
    return resized[0, :, top : top + size[0], left : left + size[1]]
