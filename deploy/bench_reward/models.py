"""Make the two served models: the embedded reward, and a CLIP as large as ViT-B/32 with random weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from deploy.settings import ROOT

EMBEDDED = ROOT / "deploy" / "tiny" / "reward"


@dataclass(frozen=True, slots=True)
class Served:
    """A served model, and how many requests take some seconds on two cores."""

    name: str
    folder: Path
    size_px: int
    num_prompt_lines: int  # of a prompt: one is what the embedded reward was trained on, six make 26 tokens on average
    num_single: dict[int, int]  # callers -> requests of one image
    num_unseen: int  # requests with texts that are not cached
    num_binary: tuple[int, int]  # requests of a batch without gradient, and with


def embedded(is_quick: bool) -> Served:
    if is_quick:
        return Served("fluent-clip", EMBEDDED, 64, 1, {1: 8, 8: 24, 32: 32}, 8, (8, 8))
    return Served("fluent-clip", EMBEDDED, 64, 1, {1: 100, 8: 320, 32: 320}, 160, (160, 60))


def large(folder: Path, is_quick: bool) -> Served:
    """Write the large model, with the embedded reward's tokenizer. quick: two layers instead of twelve."""
    depth = {"num_hidden_layers": 2 if is_quick else 12}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=depth | tokens, vision_config=dict(depth))  # ViT-B/32 but for that
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    for file in EMBEDDED.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    if is_quick:
        return Served("vit-b32", folder, 224, 6, {1: 4, 8: 8, 32: 32}, 4, (4, 4))
    return Served("vit-b32", folder, 224, 6, {1: 12, 8: 48, 32: 64}, 24, (12, 8))
