"""Make views of pictures to train rewards and judges: as drawn, through the VAE, and with disturbed latents.

Generated pictures are decoded latents that are not quite right. A net trained on drawings alone takes the decoder's
blur for a style, and a policy then exploits that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.transforms import v2

from deploy.tiny.recipe.data import Emoji, to_float

NUM_VIEWS = 4
DISTURBANCES = (0.0, 0.25, 0.5)  # standard deviations of the latents
FLIP = v2.RandomHorizontalFlip()
JITTER = v2.Compose(  # style must not hang on tint, brightness, place or sharpness
    [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(brightness=0.25, contrast=0.2, saturation=0.3, hue=0.08)], p=0.6),
        v2.RandomApply([v2.RandomAffine(degrees=12, translate=(0.08, 0.08), scale=(0.8, 1.1), fill=255)], p=0.4),
        v2.RandomApply([v2.GaussianBlur(3, (0.3, 1.0))], p=0.2),
    ]
)


def cast_color(picture: Tensor) -> Tensor:
    """Darken each channel of a uint8 picture by up to a quarter, white included, as colored light does."""
    gain = 1 - 0.25 * torch.rand(3, 1, 1)
    return (picture * gain).to(torch.uint8)


RECOLOR = v2.Compose(  # before JITTER, for a net whose gradient is climbed: a tint must not pass for a style
    [
        v2.RandomApply([v2.ColorJitter(hue=0.5)], p=0.5),
        v2.RandomApply([v2.Lambda(cast_color)], p=0.4),
        JITTER,
    ]
)


@torch.no_grad()
def make_views(emoji: Emoji, vae: AutoencoderKL, seed: int) -> Tensor:
    """Return (subjects, styles, 4 views, 3, 64, 64) uint8: the drawing, then one decoding for each disturbance."""
    generator = torch.Generator().manual_seed(seed)
    views = emoji.images[:, :, None].repeat(1, 1, NUM_VIEWS, 1, 1, 1)
    for part in torch.arange(len(emoji.labels)).split(16):
        latents = vae.encode(to_float(emoji.images[part].flatten(0, 1))).latent_dist.mode()
        for view, disturbance in enumerate(DISTURBANCES, start=1):
            noise = torch.randn(latents.shape, generator=generator) * disturbance / vae.config.scaling_factor
            decoded = vae.decode(latents + noise).sample.clamp(-1, 1)
            views[part, :, view] = ((decoded + 1) * 127.5).round().to(torch.uint8).unflatten(0, (len(part), -1))
    return views


def sample_views(
    views: Tensor,
    subjects: Tensor,
    styles: Tensor,
    shares: tuple[float, ...] = (0.25,) * NUM_VIEWS,
    jitter: Callable[[Tensor], Tensor] = JITTER,
) -> Tensor:
    """Return one picture for each (subject, style), at a random view and jittered: (batch, 3, 64, 64) in [-1, 1]."""
    chosen = torch.tensor(shares).multinomial(len(subjects), replacement=True)
    pictures = views[subjects, styles, chosen]
    return to_float(torch.stack([jitter(picture) for picture in pictures]))
