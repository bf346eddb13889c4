"""Pictures with edges and smooth parts, of any size, the same every time."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photo(height: int, width: int, contrast: float = 1.0) -> Image.Image:
    """Around middle gray; with less contrast, no resizing kernel overshoots 0 or 255."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 3) * np.cos(columns / 5), rows / height, (columns // 7 + rows // 5) % 2]
    pixels = np.stack([(wave - wave.min()) / (np.ptp(wave) + 1e-9) for wave in waves], axis=-1)
    pixels = 0.5 + contrast * (pixels - 0.5)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def tensor_of(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
