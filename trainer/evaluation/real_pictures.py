"""Read the real pictures at evaluation.reference_path, which the Fréchet distance compares with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from services.pictures import PictureError, read_picture

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_pictures(folder: Path, height_px: int, width_px: int) -> Tensor:
    """Read all pictures of a folder as (num_images, 3, height_px, width_px) uint8.

    They are turned upright, laid on white, and cropped to the shape at their center. Raise ValueError as picture_files
    does, or naming a file that is no picture.
    """
    return torch.stack([_read(file, height_px, width_px) for file in picture_files(folder)])


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder, sorted by name.

    Raise ValueError if there is no such folder, or it has fewer than two pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"evaluation.reference_path {folder} is not a folder: give one, or null to do without")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"evaluation.reference_path {folder} has {len(files)} PNG, JPEG or WebP files, not 2 or more")
    return files


def _read(file: Path, height_px: int, width_px: int) -> Tensor:
    try:
        pixels = read_picture(file)
    except PictureError as error:
        raise ValueError(f"evaluation.reference_path: {error}") from error
    picture = PIL.Image.fromarray(pixels.transpose(1, 2, 0))
    fitted = PIL.ImageOps.fit(picture, (width_px, height_px), PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
