"""A FLUX pipeline of random weights, written in seconds: every real class, at the smallest sizes that still work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

HEIGHT_PX, WIDTH_PX = 32, 48  # not square, so that swapping rows and columns shows
MAX_SEQUENCE_LENGTH = 16
PROMPTS = ("grinning face", "red heart", "fox in snow", "birthday cake", "sailing boat", "full moon", "key", "tulip")

_TEXT_WIDTH, _HIDDEN = 24, 32


def make_tiny_flux(folder: Path, *, seed: int = 0, use_dynamic_shifting: bool = False) -> Path:
    """Write a FluxPipeline folder (guidance embedding, 16 latent channels, VAE factor 8, sizes in steps of 16 px)."""
    torch.manual_seed(seed)
    pipeline = FluxPipeline(
        transformer=_tiny_transformer(),
        vae=_tiny_vae(),
        text_encoder=_tiny_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_tiny_t5(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=use_dynamic_shifting, max_shift=1.15),
    )
    pipeline.save_pretrained(folder)
    return folder


def changed_copy(flux: Path, folder: Path) -> Path:
    """Write a copy of a model with other weights in its last layer, and return its folder."""
    shutil.copytree(flux, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"proj_out.weight": weights["proj_out.weight"] + 0.3}, file, metadata={"format": "pt"})
    return folder


def _tiny_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_HIDDEN,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=512,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=32,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=512, d_model=_HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _clip_tokenizer() -> CLIPTokenizer:
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    learned = _train(tokenizer, trainer)
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    learned = _train(tokenizer, trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>", show_progress=False))
    vocab = [(piece, score) for piece, score in learned["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> dict[str, Any]:
    """The learned pieces, as the tokenizer's own JSON holds them."""
    tokenizer.train_from_iterator(PROMPTS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
