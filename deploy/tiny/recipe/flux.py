"""Train the generator: Fluent pictures, captions of which half carry the style word, guidance distilled on the fly.

Flow matching, v = noise - clean. Half of the captions say "3D." or "Flat." first, so that the base model can be told
the style; the others leave the style open. In the last part half of every batch learns classifier-free guidance as
FLUX.1-dev was distilled: its target is the average model's own guided velocity, and the scale enters by the guidance
embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from deploy.tiny.recipe.data import STYLES, Emoji, to_float
from deploy.tiny.recipe.fit import Settings, Step, fit
from deploy.tiny.recipe.generator import MAX_LENGTH, Generator, Tokens, save, tokenize
from deploy.tiny.recipe.subjects import choose
from deploy.tiny.recipe.tokenizers import clip_tokenizer, t5_tokenizer

SETTINGS = Settings(
    seed=40, num_steps=4400, learning_rate=1.2e-3, ema_decay=0.999, betas=(0.9, 0.98), warmup=300, decay_from=0.6
)
BATCH, DISTILL_FROM = 256, 0.6  # guidance distillation in the last share of the steps
DROP_SHARE, WORD_SHARE, SOLID_SHARE, SHIFT, MAX_GUIDANCE = 0.1, 0.5, 0.58, 1.5, 4.0
PAIR = [STYLES.index("Flat"), STYLES.index("3D")]


def train(emoji: Emoji, vae: AutoencoderKL, out: Path, checkpoint: Path, device: torch.device) -> None:
    """Train from scratch and save the FluxPipeline, VAE and all, to `out`."""
    torch.manual_seed(SETTINGS.seed)
    drawn = choose(emoji).drawn
    clip, t5 = clip_tokenizer(emoji, MAX_LENGTH), t5_tokenizer(emoji, MAX_LENGTH)
    labels = [emoji.labels[row] for row in drawn.tolist()]
    captions = ["", *labels, *(f"Flat. {each}" for each in labels), *(f"3D. {each}" for each in labels)]
    tokens = tokenize(clip, t5, captions).to(device)
    latents = encode(vae, emoji.images[drawn][:, PAIR], device)

    def loss(generator: Any, average: Any, step: Step) -> Tensor:
        rows, styles, wanted = _draw(len(labels), BATCH, device)
        is_distilling = step.share >= DISTILL_FROM
        return _loss(generator, average, latents[rows, styles], tokens[wanted], tokens[wanted * 0], is_distilling)

    average = fit("flux", Generator(clip, t5).to(device), loss, SETTINGS, checkpoint)
    save(average.cpu(), clip, t5, vae.cpu(), out)


def _draw(num_subjects: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return subject rows, styles (0 Flat, 1 3D) and rows of the token table, all (batch,)."""
    rows = torch.randint(num_subjects, (batch,), device=device)
    kind = torch.rand(batch, device=device)
    has_word, is_empty = kind < WORD_SHARE, kind > 1 - DROP_SHARE
    # guidance favors Flat: open captions see a little more of 3D, so that the base draws both about equally often
    solid_share = torch.where(has_word | is_empty, 0.5, SOLID_SHARE)
    styles = (torch.rand(batch, device=device) < solid_share).long()
    captions = 1 + rows + torch.where(has_word, (1 + styles) * num_subjects, 0)
    return rows, styles, torch.where(is_empty, 0, captions)


def _loss(
    generator: Generator, ema: Generator, clean: Tensor, tokens: Tokens, empty: Tokens, is_distilling: bool
) -> Tensor:
    batch, device = len(clean), clean.device
    noise = torch.randn_like(clean)
    sigma = torch.randn(batch, device=device).sigmoid()
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    target, guidance = noise - clean, torch.ones(batch, device=device)
    if is_distilling:
        half = slice(0, batch // 2)
        guidance[half] = 1 + (MAX_GUIDANCE - 1) * torch.rand(batch // 2, device=device)
        target = target.clone()
        target[half] = _guided(ema, noisy[half], sigma[half], guidance[half], tokens[half], empty[half])
    return (generator(noisy, sigma, guidance, tokens) - target).square().mean()


@torch.no_grad()
def _guided(ema: Generator, noisy: Tensor, sigma: Tensor, scale: Tensor, tokens: Tokens, empty: Tokens) -> Tensor:
    """Return v_u + scale · (v_c - v_u): classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""
    ones = torch.ones_like(scale)
    conditional, unconditional = ema(noisy, sigma, ones, tokens), ema(noisy, sigma, ones, empty)
    return unconditional + scale[:, None, None] * (conditional - unconditional)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    """Return packed latents (subjects, styles, 64, 64) of uint8 images (subjects, styles, 3, 64, 64)."""
    vae = vae.to(device)
    parts = images.flatten(0, 1).to(device).split(64)
    means = torch.cat([vae.encode(to_float(part)).latent_dist.mode() for part in parts])
    latents = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, len(latents), 16, 16, 16).unflatten(0, images.shape[:2])
