"""Embed an image as a whole and in native-resolution crops, since a downscale to 224 pixels hides texture.

With `crops: n` the image embedding is the mean of the unit embeddings of the whole image and of n crops. Similarity and
reward are linear in it, so they are means over the views, at (n + 1) times the cost of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from reward_server.models.precision import PrecisionArgs


class ViewsArgs(PrecisionArgs):
    """Settings of a reward that can look at crops; 0: at the whole image alone."""

    crops: Annotated[int, Field(ge=0, le=16)] = 0

    @property
    def num_views(self) -> int:
        return 1 + self.crops

    @property
    def version_suffix(self) -> str:
        return super().version_suffix + (f"+crops={self.crops}" if self.crops else "")


def embed_views(
    images: Tensor,
    preprocess: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    num_crops: int,
    crop_px: tuple[int, int],
) -> Tensor:
    """Return the mean of the views' unit embeddings, (batch, embedding), from one forward of all views."""
    views = [images, *native_crops(images, num_crops, crop_px)]
    embeds = normalize(encode(torch.cat([preprocess(view) for view in views])), dim=-1)
    return embeds.unflatten(0, (len(views), len(images))).mean(dim=0)


def native_crops(images: Tensor, num_crops: int, crop_px: tuple[int, int]) -> list[Tensor]:
    """Cut num_crops windows of crop_px (height, width), in an even grid from edge to edge, each (batch, 3, …).

    The grid has as many rows and columns as suit the image's shape; a window is no larger than the image.
    An image that is no larger than one window has no crops.
    """
    height, width = images.shape[-2:]
    window_height, window_width = min(crop_px[0], height), min(crop_px[1], width)
    if num_crops == 0 or (window_height, window_width) == (height, width):
        return []
    divisors = [rows for rows in range(1, num_crops + 1) if num_crops % rows == 0]
    rows = min(divisors, key=lambda rows: abs(rows * rows * width - num_crops * height))
    return [
        images[..., top : top + window_height, left : left + window_width]
        for top in _starts(height - window_height, rows)
        for left in _starts(width - window_width, num_crops // rows)
    ]


def _starts(free_px: int, count: int) -> list[int]:
    """Return where `count` windows start: the first at 0, the last at free_px; a single one is centered."""
    return [round(free_px * index / (count - 1)) for index in range(count)] if count > 1 else [free_px // 2]
