"""Read real pictures: those of evaluation.reference_path, and for each prompt its own of evaluation.truth."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.config.dataset import CaptionedConfig
from services.config.run import RunConfig
from services.pictures import PictureError, read_picture
from trainer.data.captioned_images import DatasetError, list_images

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_pictures(files: Iterable[Path], height_px: int, width_px: int) -> Tensor:
    """Read pictures as (num_images, 3, height_px, width_px) uint8.

    They are turned upright, laid on white, and cropped to the shape at their center. Raise ValueError naming a file
    that is no picture.
    """
    return torch.stack([_read(file, height_px, width_px) for file in files])


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


def read_truth(source: CaptionedConfig, prompts: Collection[str], height_px: int, width_px: int) -> dict[str, Tensor]:
    """Read the picture of each prompt as (3, height_px, width_px) uint8, fitted as by read_pictures.

    Raise DatasetError naming evaluation.truth and a prompt with no picture or with two, or a file that is no picture.
    """
    images = {}
    for image in list_images(source, "evaluation.truth"):
        if image.caption in images:
            raise DatasetError(f"evaluation.truth has two pictures of {image.caption!r}: keep one")
        images[image.caption] = image
    if missing := sorted(set(prompts) - images.keys()):
        raise DatasetError(
            f"evaluation.truth has no picture of {missing[0]!r} ({len(missing)} prompts have none): add it, or set null"
        )
    truth = {}
    for prompt in dict.fromkeys(prompts):
        try:
            pixels = images[prompt].read_pixels(images[prompt].read_bytes())
        except PictureError as error:
            raise DatasetError(f"evaluation.truth: {error}") from error
        truth[prompt] = _fit(pixels, height_px, width_px)
    return truth


def truth_of(config: RunConfig, prompts: Collection[str]) -> dict[str, Tensor] | None:
    """Read the run's real picture of each prompt; None without evaluation.truth. Raise DatasetError as read_truth."""
    source, model = config.evaluation.truth, config.model
    return None if source is None else read_truth(source, prompts, model.height_px, model.width_px)


def _read(file: Path, height_px: int, width_px: int) -> Tensor:
    try:
        pixels = read_picture(file)
    except PictureError as error:
        raise ValueError(f"evaluation.reference_path: {error}") from error
    return _fit(pixels, height_px, width_px)


def _fit(pixels: NDArray[np.uint8], height_px: int, width_px: int) -> Tensor:
    picture = PIL.Image.fromarray(pixels.transpose(1, 2, 0))
    fitted = PIL.ImageOps.fit(picture, (width_px, height_px), PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
