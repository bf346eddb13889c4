"""Published image preprocessing as differentiable tensor operations: what is PIL elsewhere, with a gradient here."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import center_crop, normalize

from reward_server.models.weights import WeightsError

_RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as written in preprocessor_config.json


def resize(images: Tensor, height_px: int, width_px: int, mode: str = "bicubic") -> Tensor:
    """What torchvision's Resize does to float images, antialiasing included; the identity where the size fits."""
    if images.shape[-2:] == (height_px, width_px):
        return images
    return interpolate(images, size=(height_px, width_px), mode=mode, antialias=True)


def fit_and_pad(images: Tensor, size_px: int) -> Tensor:
    """hpsv2's own geometry: the longest side becomes size_px (bicubic), the rest is filled with black, centred.

    The fill comes before the normalisation, so it is black to the model. (hpsv2 leaves an image whose longest side
    already fits unpadded, and then fails on it if it is not square; it is padded here.)
    """
    height, width = images.shape[-2:]
    scale = size_px / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    free_height, free_width = size_px - images.shape[-2], size_px - images.shape[-1]
    left, top = free_width // 2, free_height // 2
    return pad(images, [left, free_width - left, top, free_height - top])


class ProcessorTransform:
    """A transformers image processor (CLIPImageProcessor, SiglipImageProcessor): resize, centre crop, normalise.

    `height_px`, `width_px`: what the model sees. Raises WeightsError naming a setting that has no counterpart here.
    """

    def __init__(self, processor: Any, source: str) -> None:
        if processor.resample not in _RESAMPLE_MODES:
            raise WeightsError(f"{source}: resample {processor.resample} is not supported; 2 and 3 are")
        self._mode = _RESAMPLE_MODES[processor.resample]
        self._size = dict(processor.size) if processor.do_resize else {}
        self._crop = dict(processor.crop_size) if processor.do_center_crop else {}
        self._mean, self._std = list(processor.image_mean), list(processor.image_std)
        final = self._crop or self._size
        if not final.get("height"):
            raise WeightsError(f"{source}: neither crop_size {self._crop} nor size {self._size} fixes height and width")
        self.height_px, self.width_px = int(final["height"]), int(final["width"])

    def __call__(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, 3, height_px, width_px), normalised."""
        height, width = self._resized_px(*images.shape[-2:])
        # The published processors resize bytes, which cannot overshoot as a bicubic kernel does.
        images = resize(images, height, width, self._mode).clamp(0, 1)
        return normalize(center_crop(images, [self.height_px, self.width_px]), self._mean, self._std)

    def _resized_px(self, height: int, width: int) -> tuple[int, int]:
        if edge := self._size.get("shortest_edge"):
            return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
        return (self._size["height"], self._size["width"]) if self._size else (height, width)
