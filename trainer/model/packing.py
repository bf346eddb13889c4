"""Turn a VAE's latents into the tokens that a FLUX transformer sees, and back. Pure.

A token is a 2×2 patch of latents. FLUX gives text no position and an image token its row and column.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PATCH = 2  # diffusers' pipeline fixes it, no config holds it


def pack(latents: Tensor) -> Tensor:
    """Turn latents (batch, channels, height, width) into tokens (batch, tokens, 4·channels)."""
    patches = latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # batch, channels, rows, columns, 2, 2
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Turn tokens (batch, num_rows·num_columns, 4·channels) back into latents (batch, channels, height, width)."""
    patches = tokens.unflatten(1, (num_rows, num_columns)).unflatten(3, (-1, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@lru_cache(maxsize=8)
def text_ids(num_tokens: int, device: torch.device) -> Tensor:
    """Return the positions of text tokens: zeros (num_tokens, 3) float32."""
    return torch.zeros(num_tokens, 3, device=device)


@lru_cache(maxsize=8)
def image_ids(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Return the positions (tokens, 3) float32 of the image tokens: 0, row, column. bfloat16 has no 257."""
    rows, columns = torch.meshgrid(torch.arange(num_rows), torch.arange(num_columns), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(device, torch.float32)
