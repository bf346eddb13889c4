"""Train an AutoencoderKL on Fluent drawings (3D and Flat): 64 × 64 pixels to 16 × 16 latents of 16 channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from deploy.tiny.recipe import augment
from deploy.tiny.recipe.data import STYLES, Emoji, to_float
from deploy.tiny.recipe.fit import Settings, Step, fit

SETTINGS = Settings(seed=10, num_steps=3400, learning_rate=2e-3, ema_decay=0.998, weight_decay=1e-3)
BATCH, KL_WEIGHT = 64, 3e-4
FLUENT = [STYLES.index("3D"), STYLES.index("Flat")]
CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def train(emoji: Emoji, out: Path, checkpoint: Path, device: torch.device) -> None:
    """Train from scratch and save to `out`, with scaling and shift that give the latents unit variance and no mean."""
    torch.manual_seed(SETTINGS.seed)
    pictures = emoji.images[:, FLUENT].flatten(0, 1).to(device)

    def loss(vae: Any, _: Any, step: Step) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,), device=device)
        drawn = augment.recolor(augment.flip(to_float(pictures[chosen])), 0.3)
        return _loss(vae, augment.move(drawn, 0.3))

    vae = fit("vae", AutoencoderKL(**CONFIG).to(device), loss, SETTINGS, checkpoint)
    _normalize(vae, pictures)
    copy.deepcopy(vae).half().save_pretrained(out)


def _loss(vae: Any, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    difference = decoded.float() - images
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def _normalize(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Set the scaling and shift that normalize the latents of every fourth picture."""
    latents = torch.cat([vae.encode(to_float(part)).latent_dist.mode() for part in pictures[::4].split(64)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return uint8 pictures (batch, 3, 64, 64) as the VAE gives them back, in [-1, 1]."""
    parts = [vae.decode(vae.encode(to_float(part)).latent_dist.mode()).sample for part in pictures.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Return the mean over uint8 pictures of the peak signal-to-noise ratio in dB, pixels in [0, 1]."""
    errors = ((reconstruct(vae, pictures) - to_float(pictures)) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * errors.log10()).mean())
