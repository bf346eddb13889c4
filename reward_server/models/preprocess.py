"""Do the published image preprocessing, which is PIL elsewhere, as differentiable tensor operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import normalize

from reward_server.models.weights import WeightsError

_SIDES = ("height", "width")
_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as written in preprocessor_config.json


def as_float(images: Tensor) -> Tensor:
    """Return bytes as float32, where 255 means 1, and floats as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def resize(images: Tensor, height_px: int, width_px: int, mode: str = "bicubic") -> Tensor:
    """Resize floats or bytes as torchvision's Resize does, with antialiasing; the identity if the size fits."""
    if images.shape[-2:] == (height_px, width_px):
        return images
    return interpolate(images, size=(height_px, width_px), mode=mode, antialias=True)


def fit_and_pad(images: Tensor, size_px: int) -> Tensor:
    """Resize as hpsv2 does: the longest side becomes size_px (bicubic), the rest is filled with black, centered.

    The fill comes before the normalization, so it is black to the model. (hpsv2 leaves an image whose longest side
    already fits unpadded, and then fails on it if it is not square; it is padded here.)
    """
    height, width = images.shape[-2:]
    scale = size_px / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    free_height, free_width = size_px - images.shape[-2], size_px - images.shape[-1]
    left, top = free_width // 2, free_height // 2
    return pad(images, [left, free_width - left, top, free_height - top])


class ResizeAndCrop:
    """Resizes, crops the center and normalizes as transformers' image processors and torchvision's transforms do.

    `size`: {"height", "width"} or {"shortest_edge"}. `crop`: {"height", "width"} of at most that, or empty.
    `round_start`: how to round where a crop starts; transformers rounds down, torchvision to even. `height_px`,
    `width_px`: the size that the model sees. Raises WeightsError if these settings do not fit together.
    """

    def __init__(
        self,
        size: Mapping[str, int],
        crop: Mapping[str, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mode: str = "bicubic",
        round_start: Callable[[float], int] = round,
    ) -> None:
        smallest = dict.fromkeys(_SIDES, size.get("shortest_edge", 0)) | dict(size)
        final = crop or size
        if any(not 0 < final.get(side, 0) <= smallest[side] for side in _SIDES):
            raise WeightsError(f"preprocessing with size {dict(size)} and crop {dict(crop)} is not supported")
        self.height_px, self.width_px = final["height"], final["width"]
        self._size, self._mode, self._round_start = size, mode, round_start
        self._mean, self._std = list(mean), list(std)

    @classmethod
    def of_processor(cls, processor: Any) -> ResizeAndCrop:
        """Copy a CLIPImageProcessor or SiglipImageProcessor. Raise WeightsError naming an unsupported setting."""
        if processor.resample not in _RESAMPLE_MODES:
            raise WeightsError(f"preprocessing with resample {processor.resample} is not supported; 2 and 3 are")
        size = _set_entries(processor.size) if processor.do_resize else {}
        crop = _set_entries(processor.crop_size) if processor.do_center_crop else {}
        mode = _RESAMPLE_MODES[processor.resample]
        return cls(size, crop, processor.image_mean, processor.image_std, mode=mode, round_start=math.floor)

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess (batch, 3, height, width) in [0, 1], or bytes on the CPU, as (batch, 3, height_px, width_px).

        Bytes are resized as bytes, as the published code does: in a tenth of the time of floats, without gradient.
        """
        # Bytes cannot overshoot as a bicubic kernel does, so floats may not.
        images = as_float(self._resized(images)).clamp(0, 1)
        return normalize(self._cropped(images), self._mean, self._std)

    def shrink(self, images: Tensor) -> Tensor:
        """Turn bytes (batch, 3, height, width) on the CPU into fewer bytes, for which __call__ gives the same.

        Lets a caller prepare images before the model's turn. They are cropped as well, so that photos of all shapes get
        one size, provided that __call__ leaves such an image as it is.
        """
        images = self._resized(images)
        final = self.height_px, self.width_px
        return self._cropped(images) if self._resized_px(*final) == final else images

    def _resized(self, images: Tensor) -> Tensor:
        return resize(images, *self._resized_px(*images.shape[-2:]), self._mode)

    def _cropped(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left = self._round_start((height - self.height_px) / 2), self._round_start((width - self.width_px) / 2)
        return images[..., top : top + self.height_px, left : left + self.width_px]

    def _resized_px(self, height: int, width: int) -> tuple[int, int]:
        edge = self._size.get("shortest_edge")
        if edge is None:
            return self._size["height"], self._size["width"]
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def _set_entries(size: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in dict(size).items() if value is not None}
