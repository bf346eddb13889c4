"""Reward models: the real classes at tiny sizes with random weights, saved in the formats of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

_TINY_CLIP_VOCABULARY = {
    character + end: 2 + index
    for index, (character, end) in enumerate(
        (chr(code), end) for code in range(ord("!"), ord("~") + 1) for end in ("", "</w>")
    )
} | {"<|startoftext|>": 0, "<|endoftext|>": 1}


def make_tiny_clip(folder: Path, image_size_px: int = 32, max_tokens: int = 48, seed: int = 0) -> Path:
    """A folder with a random CLIPModel, a tokenizer of single characters and a preprocessor_config.json."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(_TINY_CLIP_VOCABULARY),
        "max_position_embeddings": max_tokens,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = tower | {"image_size": image_size_px, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPTokenizer(vocab=_TINY_CLIP_VOCABULARY, merges=[]).save_pretrained(folder)
    size = {"shortest_edge": image_size_px}
    crop = {"height": image_size_px, "width": image_size_px}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    return folder


def make_tiny_hpsv2(folder: Path, image_size_px: int = 28, seed: int = 0) -> tuple[str, Path]:
    """(architecture, checkpoint): an open_clip config folder and a file as the HPS v2 authors publish theirs."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": image_size_px, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}), encoding="utf-8")
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    checkpoint = folder / "HPS_tiny.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, checkpoint)
    return f"local-dir:{folder}", checkpoint
