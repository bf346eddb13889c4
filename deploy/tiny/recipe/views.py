"""Make views of pictures to train rewards and judges: as drawn, through the VAE, and with disturbed latents.

Generated pictures are decoded latents that are not quite right. A net trained on drawings alone takes the decoder's
blur for a style, and a policy then exploits that.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from deploy.tiny.recipe.data import Emoji, to_float

DISTURBANCES = (0.0, 0.25, 0.5)  # standard deviations of the latents
NUM_VIEWS, SEED = 1 + len(DISTURBANCES), 50


@torch.no_grad()
def make_views(emoji: Emoji, vae: AutoencoderKL, device: torch.device) -> Tensor:
    """Return (subjects, styles, 4 views, 3, 64, 64) uint8: the drawing, then one decoding for each disturbance."""
    torch.manual_seed(SEED)
    views = emoji.images[:, :, None].repeat(1, 1, NUM_VIEWS, 1, 1, 1)
    for rows in torch.arange(len(views)).split(64):
        latents = vae.encode(to_float(emoji.images[rows].flatten(0, 1).to(device))).latent_dist.mode()
        for view, disturbance in enumerate(DISTURBANCES, start=1):
            noise = torch.randn_like(latents) * disturbance / vae.config.scaling_factor
            decoded = vae.decode(latents + noise).sample.clamp(-1, 1)
            pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).cpu()
            views[rows, :, view] = pixels.unflatten(0, (len(rows), -1))
        print(f"views {int(rows[-1]) + 1}/{len(views)}", flush=True)
    return views


def look_up(views: Tensor, subjects: Tensor, styles: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Return one picture in [-1, 1] for each (subject, style), at a view drawn by `shares`: (batch, 3, 64, 64)."""
    chosen = torch.tensor(shares, device=views.device).multinomial(len(subjects), replacement=True)
    return to_float(views[subjects, styles, chosen])
