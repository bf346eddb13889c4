"""Fluent pictures and captions without style words -> a small FLUX: transformer and both text encoders, from scratch.

Flow matching (v = noise - clean) on a skewed mixture of styles, mostly Flat, so that there is something to align.
In the last third half of every batch learns guidance distillation on the fly, as FLUX.1-dev was distilled: the
target is the moving average's own classifier-free guided velocity, and the scale enters through the guidance embedding.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from deploy.tiny.recipe.data import STYLES, Emoji, to_float
from deploy.tiny.recipe.tokenizers import clip_tokenizer, t5_tokenizer

NUM_STEPS, BATCH, LEARNING_RATE, EMA_DECAY, MAX_LENGTH = 7000, 64, 1e-3, 0.999, 16
WARMUP, DECAY_FROM, DISTILL_FROM = 500, 0.65, 0.65  # steps, share of the steps
FLAT_SHARE, DROP_SHARE, SHIFT, MAX_GUIDANCE = 0.6, 0.1, 1.5, 4.5
CHECKPOINT_EVERY, SEED = 500, 40
TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


class Generator(Module):
    """The trained parts, transformer and two text encoders, as one module, so that one average covers all."""

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**TRANSFORMER)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        self.register_buffer("image_ids", torch.stack([torch.zeros(4, 4), rows, columns], -1).reshape(16, 3))
        self.register_buffer("text_ids", torch.zeros(MAX_LENGTH, 3))

    def forward(self, latents: Tensor, sigma: Tensor, guidance: Tensor, tokens: Tokens) -> Tensor:
        """Predict the velocity of latents (batch, 16, 64); sigma and guidance are (batch,)."""
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.transformer(
                hidden_states=latents,
                timestep=sigma,
                guidance=guidance,
                encoder_hidden_states=self.t5(tokens.t5)[0],
                pooled_projections=self.clip(tokens.clip).pooler_output,
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return velocity.float()


@dataclass(frozen=True)
class Tokens:
    """Padded token ids of the captions for both encoders, (batch, 16) each."""

    clip: Tensor
    t5: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        return Tokens(self.clip[rows], self.t5[rows])


def train(emoji: Emoji, vae: AutoencoderKL, checkpoint: Path, out: Path) -> None:
    """Train from scratch or from `checkpoint` and save the FluxPipeline, VAE and all, to `out`."""
    torch.manual_seed(SEED)
    clip, t5 = clip_tokenizer(emoji, MAX_LENGTH), t5_tokenizer(emoji, MAX_LENGTH)
    training = (~emoji.heldout).nonzero().flatten()
    latents = _encode(vae, emoji.images[training][:, [STYLES.index("Flat"), STYLES.index("3D")]])
    generator = Generator(clip, t5)
    ema: Any = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    state: dict[str, Any] = {"generator": generator, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    first = _resume(checkpoint, state)
    started, total = time.monotonic(), 0.0
    for step in range(first, NUM_STEPS):
        torch.manual_seed(SEED * 1_000_000 + step)  # a resumed run sees the same noise
        chosen = torch.randint(len(training), (BATCH,))
        rng = random.Random(step)
        captions = [
            "" if rng.random() < DROP_SHARE else emoji.caption(subject, rng) for subject in training[chosen].tolist()
        ]
        style = (torch.rand(BATCH) > FLAT_SHARE).long()
        loss = _loss(
            generator, ema.module, latents[chosen, style], tokenize(clip, t5, captions), _empty(clip, t5), step
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(generator)
        total += float(loss)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            seconds = time.monotonic() - started
            rate = (step + 1 - first) / seconds
            print(
                f"flux {step + 1}/{NUM_STEPS} loss {total / CHECKPOINT_EVERY:.4f} {seconds:.0f} s, "
                f"{(NUM_STEPS - step - 1) / rate:.0f} s to go",
                flush=True,
            )
            total = 0.0
            draft = checkpoint.with_name(f"{checkpoint.name}.draft")
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in state.items()}}, draft)
            draft.replace(checkpoint)  # whole, whenever it is interrupted
    save(ema.module, clip, t5, vae, out)


def save(generator: Generator, clip: CLIPTokenizer, t5: T5Tokenizer, vae: AutoencoderKL, out: Path) -> None:
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=generator.clip,
        tokenizer=clip,
        text_encoder_2=generator.t5,
        tokenizer_2=t5,
        transformer=generator.transformer,
    ).to(dtype=torch.float16).save_pretrained(out)
    for name in ("text_encoder", "text_encoder_2"):  # transformers follows the config's dtype, diffusers takes float32
        config = out / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def tokenize(clip: CLIPTokenizer, t5: T5Tokenizer, captions: list[str]) -> Tokens:
    """Tokenize as FluxPipeline does: padded to a fixed length, without attention masks."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (clip, t5)
    ]
    return Tokens(*ids)


def _empty(clip: CLIPTokenizer, t5: T5Tokenizer) -> Tokens:
    return tokenize(clip, t5, [""] * (BATCH // 2))


def _loss(generator: Generator, ema: Generator, clean: Tensor, tokens: Tokens, empty: Tokens, step: int) -> Tensor:
    noise = torch.randn_like(clean)
    sigma = torch.randn(BATCH).sigmoid()
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    target, guidance = noise - clean, torch.ones(BATCH)
    if step >= DISTILL_FROM * NUM_STEPS:
        half = slice(0, BATCH // 2)
        guidance[half] = 1 + (MAX_GUIDANCE - 1) * torch.rand(BATCH // 2)
        target = target.clone()
        target[half] = _guided(ema, noisy[half], sigma[half], guidance[half], tokens[half], empty)
    return (generator(noisy, sigma, guidance, tokens) - target).square().mean()


@torch.no_grad()
def _guided(ema: Generator, noisy: Tensor, sigma: Tensor, scale: Tensor, tokens: Tokens, empty: Tokens) -> Tensor:
    """Return v_u + scale · (v_c - v_u): classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""
    ones = torch.ones_like(scale)
    conditional, unconditional = ema(noisy, sigma, ones, tokens), ema(noisy, sigma, ones, empty)
    return unconditional + scale[:, None, None] * (conditional - unconditional)


def _learning_rate(step: int) -> float:
    """Return the learning rate: warm-up, constant, linear decay."""
    decay = (NUM_STEPS - step) / (NUM_STEPS * (1 - DECAY_FROM))
    return min(1.0, (step + 1) / WARMUP, max(decay, 0.02))


def _resume(checkpoint: Path, state: dict[str, Any]) -> int:
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode (subjects, styles, 3, 64, 64) uint8 as packed latents (subjects, styles, 16, 64)."""
    means = [vae.encode(to_float(part)).latent_dist.mode() for part in images.flatten(0, 1).split(64)]
    latents = (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, len(latents), 16, 8, 8).unflatten(0, images.shape[:2])
