"""Lay images out as one picture: a grid with captions, or the images of several sources side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_TILE_PX = 96  # smaller images are enlarged by a whole factor
_CAPTION_PX = 16


def picture_grid(images: Tensor, captions: Sequence[str], num_columns: int) -> PIL.Image.Image:
    """Return images (num_images, 3, height, width) uint8 as one picture, in rows, each above its caption."""
    factor = max(1, math.ceil(_MIN_TILE_PX / images.shape[2]))
    height, width = images.shape[2] * factor, images.shape[3] * factor
    num_rows = math.ceil(len(images) / num_columns)
    grid = PIL.Image.new("RGB", (num_columns * width, num_rows * (height + _CAPTION_PX)), "white")
    pen, font = PIL.ImageDraw.Draw(grid), PIL.ImageFont.load_default(size=11)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % num_columns * width, index // num_columns * (height + _CAPTION_PX)
        tile = PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        grid.paste(tile.resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + height + 1), _shorten(caption, font, width - 4), fill="black", font=font)
    return grid


def side_by_side(columns: Sequence[Tensor], prompts: Sequence[str], num_columns: int) -> PIL.Image.Image:
    """Return the images of several sources as one picture: those of one prompt side by side, in the given order.

    columns: the images of each source, (num_images, 3, height, width) uint8, such as base, aligned and real.
    """
    rows = F.pad(torch.cat(list(columns), dim=3), (0, max(2, columns[0].shape[3] // 16)), value=255)
    return picture_grid(rows, prompts, num_columns)


def _shorten(text: str, font: Any, width_px: int) -> str:
    while font.getlength(text) > width_px:
        text = text[:-2] + "…"
    return text
