"""FLUX.1-dev as its authors publish it for diffusers, at a shrunken size: their files, configs, names and dtype.

Only numbers of layers, widths and vocabularies differ. Weights are random. `components` are the same networks and
tokenizers, built in memory, to compare with what a loader makes of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
_TRANSFORMER = {  # no axes_dims_rope: the class's default fits 128 alone
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 32,  # published: 4096
    "num_attention_heads": 1,  # 24
    "num_layers": 2,  # 19
    "num_single_layers": 3,  # 38
    "patch_size": 1,
    "pooled_projection_dim": 24,  # 768
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 16],  # 128, 256, 512, 512
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,  # 32
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_CLIP = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,  # which is not the tokenizer's: the model then takes the highest token for the end
    "hidden_act": "quick_gelu",
    "hidden_size": 24,  # 768
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 48,  # 3072
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,  # 12
    "num_hidden_layers": 2,  # 12
    "pad_token_id": 1,
    "projection_dim": 24,  # 768
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "vocab_size": 56,  # 49408
}
_T5 = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 48,  # 10240
    "d_kv": 8,  # 64
    "d_model": 32,  # 4096
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 2,  # 64
    "num_layers": 2,  # 24
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 160,  # 32128
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLIP_VOCABULARY = {
    token: number for number, token in enumerate([*_LETTERS, *(f"{each}</w>" for each in _LETTERS), "fo", "fox</w>"])
} | {"<|startoftext|>": 54, "<|endoftext|>": 55}
_CLIP_MERGES = ("f o", "fo x</w>")
_T5_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁fox", -3.0)]
_T5_PIECES += [(each, -4.0) for each in _LETTERS]


def write_published_flux(folder: Path, seed: int = 0) -> dict[str, nn.Module]:
    """Write the folder; return its networks in bfloat16, by their names in it."""
    torch.manual_seed(seed)
    networks: dict[str, nn.Module] = {
        "transformer": FluxTransformer2DModel.from_config(_TRANSFORMER),
        "vae": AutoencoderKL.from_config(_VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_CLIP)),
        "text_encoder_2": T5EncoderModel(T5Config(**_T5)),
    }
    configs = {"transformer": _TRANSFORMER, "vae": _VAE, "text_encoder": _CLIP, "text_encoder_2": _T5}
    for name, config in configs.items():
        _write_json(folder / name / "config.json", config)
    _write_json(folder / "model_index.json", _INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_clip_tokenizer(folder / "tokenizer")
    _write_t5_tokenizer(folder / "tokenizer_2")
    weights = {name: network.bfloat16().eval().state_dict() for name, network in networks.items()}
    clip = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in weights["text_encoder"].items()}
    t5 = {name: each for name, each in weights["text_encoder_2"].items() if name != "encoder.embed_tokens.weight"}
    _save(folder / "text_encoder" / "model", clip, 1)
    _save(folder / "text_encoder_2" / "model", t5, 2)
    _save(folder / "transformer" / "diffusion_pytorch_model", weights["transformer"], 3)
    _save(folder / "vae" / "diffusion_pytorch_model", weights["vae"], 1)
    return networks


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    made: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(_SCHEDULER)
    return made


def _save(stem: Path, weights: Mapping[str, Tensor], num_files: int) -> None:
    """Write stem.safetensors, or stem-00001-of-0000N.safetensors and their index."""
    names = sorted(weights)
    size = -(-len(names) // num_files)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = (
            f"{stem.name}.safetensors" if num_files == 1 else f"{stem.name}-{number:05}-of-{num_files:05}.safetensors"
        )
        save_file({name: weights[name].contiguous() for name in part}, stem.parent / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if num_files > 1:
        total = sum(weights[name].numel() * weights[name].element_size() for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(stem.parent / f"{stem.name}.safetensors.index.json", index)


def _write_clip_tokenizer(folder: Path) -> None:
    start, end = "<|startoftext|>", "<|endoftext|>"
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {"54": _special(start, normalized=True), "55": _special(end)},
        "bos_token": start,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": end,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end,
    }
    special = {"bos_token": _special(start), "eos_token": _special(end), "pad_token": end, "unk_token": _special(end)}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "vocab.json", _CLIP_VOCABULARY)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_CLIP_MERGES]) + "\n", encoding="utf-8")


def _write_t5_tokenizer(folder: Path) -> None:
    extra = [f"<extra_id_{number}>" for number in range(100)]
    numbers = {token: len(_T5_PIECES) + 99 - number for number, token in enumerate(extra)}
    settings: dict[str, Any] = {
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(number): _special(token) for token, number in ({"<pad>": 0, "</s>": 1, "<unk>": 2} | numbers).items()
        },
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 512,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    special = {"additional_special_tokens": extra} | {
        key: _special(settings[key]) for key in ("eos_token", "pad_token", "unk_token")
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    tokenizer = Tokenizer(models.Unigram([*_T5_PIECES, *((token, 0.0) for token in reversed(extra))], unk_id=2))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    tokenizer.save(str(folder / "tokenizer.json"))


def _special(token: str, *, normalized: bool = False) -> dict[str, Any]:
    return {
        "content": token,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
