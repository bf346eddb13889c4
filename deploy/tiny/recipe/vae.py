"""Pictures -> AutoencoderKL: 64 x 64 pixels to 8 x 8 latents of 16 channels, trained on Fluent (3D and Flat) only."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from deploy.tiny.recipe.data import STYLES, Emoji, to_float

NUM_STEPS, BATCH, LEARNING_RATE, KL_WEIGHT, EMA_DECAY = 6500, 8, 2e-3, 3e-4, 0.997
FLUENT = [STYLES.index("3D"), STYLES.index("Flat")]
CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
AUGMENT = v2.Compose(  # other colors and places, never another style: edges and shading stay as drawn
    [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(brightness=0.2, saturation=0.3, hue=0.5)], p=0.5),
        v2.RandomApply([v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.7, 1.2), fill=255)], p=0.3),
    ]
)


def train(emoji: Emoji, out: Path) -> None:
    """Train from scratch and save to `out`, with scaling and shift that give the latents unit variance and no mean."""
    torch.manual_seed(10)
    pictures = emoji.images[~emoji.heldout][:, FLUENT].flatten(0, 1)
    vae = AutoencoderKL(**CONFIG)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS, pct_start=0.03)
    started = time.monotonic()
    for step in range(NUM_STEPS):
        images = to_float(torch.stack([AUGMENT(pictures[i]) for i in torch.randint(len(pictures), (BATCH,))]))
        loss = _loss(vae, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(vae)
        if step % 500 == 0:
            seconds = time.monotonic() - started
            quality = psnr(ema.module, emoji)
            print(f"vae {step}/{NUM_STEPS} loss {loss:.4f} PSNR {quality:.2f} dB {seconds:.0f} s", flush=True)
    save(ema.module, pictures, out)


def _loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    difference = decoded.float() - images
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, emoji: Emoji) -> float:
    """Return the peak signal-to-noise ratio in dB, mean over the held-out Fluent pictures, pixels in [0, 1]."""
    images = to_float(emoji.images[emoji.heldout][:, FLUENT].flatten(0, 1))
    decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in images.split(64)]
    mse = ((torch.cat(decoded) - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def save(vae: AutoencoderKL, pictures: Tensor, out: Path) -> None:
    latents = torch.cat([vae.encode(to_float(part)).latent_dist.mode() for part in pictures[::4].split(64)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    copy.deepcopy(vae).half().save_pretrained(out)
