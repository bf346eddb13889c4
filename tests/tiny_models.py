"""Reward models: the real classes at tiny sizes with random weights, saved in the formats of the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from aesthetic_predictor_v2_5 import AestheticPredictorV2_5Head
from hpsv2 import img_score
from hpsv2.src.open_clip import factory as hpsv2_factory
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from reward_server.models import Hpsv2Args

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


_TINY_HPSV2 = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_tiny_hpsv2(folder: Path, architecture: str | None = None, seed: int = 0) -> tuple[str, Path]:
    """(architecture, checkpoint): one that open_clip knows (None: a tiny one) and a file as HPS v2 is published."""
    if architecture is None:
        architecture = f"local-dir:{folder}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": _TINY_HPSV2}), encoding="utf-8")
    torch.manual_seed(seed)
    checkpoint = folder / "HPS_random.pt"
    _save_hpsv2(open_clip.create_model(architecture, load_weights=False), checkpoint)
    return architecture, checkpoint


def _save_hpsv2(model: torch.nn.Module, checkpoint: Path) -> None:
    """In half precision, as HPS_v2.1_compressed.pt is."""
    state_dict = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state_dict}, checkpoint)


@contextmanager
def published_hpsv2(
    args: Hpsv2Args, *, writes_checkpoint: bool = False
) -> Iterator[Callable[[Sequence[Image.Image], str], list[float]]]:
    """hpsv2.score, the package's own code from pictures and prompt to numbers, on this checkpoint and architecture.

    The package always starts from laion2B weights off the hub; here its model starts at random, as the checkpoint
    replaces every weight. writes_checkpoint: first, of just these random weights.
    """
    if args.architecture.startswith("local-dir:"):
        hpsv2_factory._MODEL_CONFIGS["tiny"] = _TINY_HPSV2
    name = "tiny" if args.architecture.startswith("local-dir:") else args.architecture
    model, _, preprocess = hpsv2_factory.create_model_and_transforms(name, light_augmentation=True, output_dict=True)
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    if writes_checkpoint:
        _save_hpsv2(model, Path(args.path))
    try:
        yield lambda pictures, prompt: [float(each) for each in img_score.score([*pictures], prompt, cp=args.path)]
    finally:
        img_score.model_dict.clear()


def make_tiny_aesthetic(folder: Path, image_size_px: int = 28, seed: int = 0) -> tuple[Path, Path]:
    """(backbone, head): a SigLIP folder and a file as the authors of Aesthetic Predictor v2.5 publish it."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "projection_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = tower | {"image_size": image_size_px, "patch_size": 14}
    config = SiglipConfig(text_config=text, vision_config=vision)
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": image_size_px, "width": image_size_px}).save_pretrained(folder)
    head = AestheticPredictorV2_5Head(config.vision_config)
    torch.save(head.state_dict(), folder / "head.pth")
    return folder, folder / "head.pth"
