"""The small FLUX as one module: transformer and both text encoders, so that one average covers all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import Module
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

MAX_LENGTH, GRID, TEXT_CHANNELS = 16, 8, 192
TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": TEXT_CHANNELS,
    "pooled_projection_dim": TEXT_CHANNELS,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


@dataclass(frozen=True)
class Tokens:
    """Padded token ids of captions for both encoders, (batch, 16) each."""

    clip: Tensor
    t5: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        return Tokens(self.clip[rows], self.t5[rows])

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.clip.to(device), self.t5.to(device))


class Generator(Module):
    """What is trained of a FluxPipeline."""

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**TRANSFORMER)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=TEXT_CHANNELS,
                intermediate_size=2 * TEXT_CHANNELS,
                num_hidden_layers=2,
                num_attention_heads=6,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=TEXT_CHANNELS,
                d_kv=32,
                d_ff=2 * TEXT_CHANNELS,
                num_layers=2,
                num_heads=6,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        rows, columns = torch.meshgrid(torch.arange(float(GRID)), torch.arange(float(GRID)), indexing="ij")
        ids = torch.stack([torch.zeros(GRID, GRID), rows, columns], -1).reshape(GRID**2, 3)
        self.register_buffer("image_ids", ids)
        self.register_buffer("text_ids", torch.zeros(MAX_LENGTH, 3))

    def forward(self, latents: Tensor, sigma: Tensor, guidance: Tensor, tokens: Tokens) -> Tensor:
        """Return the velocity, shaped as latents (batch, 64, 64); sigma and guidance (batch,)."""
        with torch.autocast(latents.device.type, torch.bfloat16):
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


def tokenize(clip: CLIPTokenizer, t5: T5Tokenizer, captions: list[str]) -> Tokens:
    """Return token ids as FluxPipeline makes them: padded to a fixed length, without attention masks."""
    ids = [
        tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        for tokenizer in (clip, t5)
    ]
    return Tokens(*ids)


def save(generator: Generator, clip: CLIPTokenizer, t5: T5Tokenizer, vae: AutoencoderKL, out: Path) -> None:
    """Save a FluxPipeline, stored in float16, that a plain from_pretrained loads in float32 throughout."""
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
