"""Change images at random before a reward sees them: mirror and shift them, so that no fixed pattern pleases it.

Over-optimized images carry patterns that a reward likes at one place only, such as a lattice in step with its patches.
A gradient that has passed through random mirrors and shifts averages them out (as the cutouts of CLIP-guided synthesis
do; Crowson et al., arXiv 2204.08583).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.config.rewards import AugmentationConfig, RewardConfig
from trainer.draws import image_generator, place_generator


@dataclass(frozen=True, slots=True, eq=False)
class ImageDraws:
    """What is drawn for each image before it is scored; None where no reward of the run needs it.

    noise: standard normal (batch, 3, height, width), for rewards that compare an image with a noised one.
    places: uniform in [0, 1), (batch, 3): mirrored or not, shift down, shift right.
    """

    noise: Tensor | None = None
    places: Tensor | None = None


NOTHING_DRAWN = ImageDraws()


def draw_for_images(
    rewards: Sequence[RewardConfig], seed: int, step: int, images: Sequence[tuple[int, int]], size: tuple[int, int]
) -> ImageDraws:
    """Draw what the rewards need. images: (sample_index, number) of each image; size: (height, width) in pixels."""
    noise = places = None
    if any(reward.pair == "noised_image" for reward in rewards):
        generators = [image_generator(seed, step, index, number) for index, number in images]
        noise = torch.stack([torch.randn(3, *size, generator=each) for each in generators])
    if any(reward.augmentation is not None for reward in rewards):
        generators = [place_generator(seed, step, index, number) for index, number in images]
        places = torch.stack([torch.rand(3, generator=each) for each in generators])
    return ImageDraws(noise, places)


def augment(images: Tensor, places: Tensor, augmentation: AugmentationConfig) -> Tensor:
    """Return images (batch, 3, height, width) mirrored and shifted by `places` (ImageDraws), with gradient.

    Pixels that come in at an edge repeat it. The shifts are whole pixels, all of up to max_shift equally often.
    """
    largest = [round(augmentation.max_shift * size) for size in images.shape[2:]]
    down, right = largest
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    height, width = images.shape[2:]
    augmented = []
    for image, (mirror, *shift) in zip(padded, places.tolist(), strict=True):
        top, left = (int(share * (2 * most + 1)) for share, most in zip(shift, largest, strict=True))
        window = image[:, top : top + height, left : left + width]
        augmented.append(window.flip(2) if augmentation.mirrors and mirror < 0.5 else window)
    return torch.stack(augmented)
