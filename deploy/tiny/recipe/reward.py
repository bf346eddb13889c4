"""Train the embedded reward, a small CLIPModel, so that spoiled pictures earn nothing.

Contrastive, captions with style words: a batch holds every subject in two styles, and spoiled copies that are told
apart by the caption "Spoiled. …". A second loss keeps the difference R("3D. …") - R("Flat. …") of a spoiled picture
near zero, as it is neither.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from deploy.tiny.recipe import augment
from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji, to_float
from deploy.tiny.recipe.fit import Settings, Step, fit
from deploy.tiny.recipe.subjects import choose, classifiable
from deploy.tiny.recipe.tokenizers import clip_tokenizer
from deploy.tiny.recipe.views import look_up

SETTINGS = Settings(seed=20, num_steps=6000, learning_rate=1.5e-3, ema_decay=0.998, weight_decay=0.1, betas=(0.9, 0.98))
MAX_LENGTH = 24
NUM_SUBJECTS, FLUENT_SHARE, NEUTRAL_WEIGHT = 64, 0.6, 4.0
VIEW_SHARES = (0.25, 0.3, 0.3, 0.15)
SOLID, FLAT = STYLES.index("3D"), STYLES.index("Flat")
SPOILED = "Spoiled"
VISION = {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 5, "num_attention_heads": 5}
TEXT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}


def train(emoji: Emoji, views: Tensor, out: Path, checkpoint: Path) -> None:
    """Train from scratch on the views' device; save model, tokenizer and image processor to `out`."""
    torch.manual_seed(SETTINGS.seed)
    tokenizer = clip_tokenizer(emoji, MAX_LENGTH)
    training = classifiable(emoji, choose(emoji)).to(views.device)

    def loss(model: Any, _: Any, step: Step) -> Tensor:
        return _loss(model, tokenizer, emoji, views, training, step.random)

    def limit_scale(model: Any) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=3.9)  # a temperature of at least 0.02: a smoother reward to climb

    average = fit("reward", CLIPModel(_config(tokenizer)).to(views.device), loss, SETTINGS, checkpoint, limit_scale)
    average.cpu().half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": SIZE_PX, "width": SIZE_PX}
    CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    ).save_pretrained(out)


def _loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, emoji: Emoji, views: Tensor, training: Tensor, rng: random.Random
) -> Tensor:
    subjects = training[torch.randperm(len(training), device=training.device)[:NUM_SUBJECTS]]
    styles = _style_pairs(len(subjects), views.device)
    pictures = look_up(views, subjects.repeat(2), styles.flatten(), VIEW_SHARES)
    pictures = augment.cast_color(augment.recolor(pictures, 0.5), 0.4)
    half = slice(0, len(subjects))
    spoiled = augment.jitter(
        augment.spoil(torch.where(_coin(len(subjects), views.device), pictures[half], pictures[len(subjects) :]))
    )
    images = torch.cat([augment.jitter(pictures), spoiled])
    words = [STYLES[style] for style in styles.flatten().tolist()] + [SPOILED] * len(subjects)
    captions = [
        f"{word}. {emoji.caption(row, rng)}" for word, row in zip(words, subjects.repeat(3).tolist(), strict=True)
    ]
    labels = [emoji.labels[row] for row in subjects.tolist()]
    pair = [f"{STYLES[style]}. {label}" for style in (SOLID, FLAT) for label in labels]
    with torch.autocast(views.device.type, torch.bfloat16):
        image = embed_images(model, images)
        text = embed_texts(model, tokens(tokenizer, [*captions, *pair], views.device))
    caption, (solid, flat) = text[: len(captions)], text[len(captions) :].view(2, len(labels), -1)
    logits = model.logit_scale.exp() * image @ caption.T
    target = torch.arange(len(logits), device=logits.device)
    contrast = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    difference = (image[-len(labels) :] * (solid - flat)).sum(dim=-1)
    return contrast + NEUTRAL_WEIGHT * difference.square().mean()


def _coin(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, 1, 1, 1, device=device) < 0.5


def _style_pairs(count: int, device: torch.device) -> Tensor:
    """Return two styles for each subject, (2, count); 3D and Flat, the hardest to tell apart, are more frequent."""
    pairs = torch.rand(count, len(STYLES), device=device).argsort(dim=1)[:, :2]
    fluent = torch.where(
        torch.rand(count, 1, device=device) < 0.5,
        torch.tensor([SOLID, FLAT], device=device),
        torch.tensor([FLAT, SOLID], device=device),
    )
    return torch.where(torch.rand(count, 1, device=device) < FLUENT_SHARE, fluent, pairs).T


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, emoji: Emoji, views: Tensor) -> dict[str, float]:
    """Return numbers on held-out subjects.

    orders_3d_flat: how often R("3D. …") - R("Flat. …") is larger on the 3D picture than on the Flat one, through the
    VAE. spoiling_pays: how often a spoiled Flat picture has a larger difference than the real 3D one. subject_top5:
    how often a picture's own caption is among the five nearest.
    """
    torch.manual_seed(0)
    rows = choose(emoji).held_out.to(views.device)
    labels = [emoji.labels[row] for row in rows.tolist()]
    difference = embed_texts(model, tokens(tokenizer, [f"3D. {each}" for each in labels], views.device)) - embed_texts(
        model, tokens(tokenizer, [f"Flat. {each}" for each in labels], views.device)
    )
    solid, flat = (to_float(views[rows, style, 1]) for style in (SOLID, FLAT))

    def reward(pictures: Tensor) -> Tensor:
        return (embed_images(model, pictures) * difference).sum(dim=-1)

    spoiled = torch.stack([reward(augment.spoil(flat)) for _ in range(8)])
    plain = embed_texts(model, tokens(tokenizer, labels, views.device))
    nearest = (embed_images(model, solid) @ plain.T).topk(5).indices
    found = (nearest == torch.arange(len(labels), device=views.device)[:, None]).any(dim=-1)
    return {
        "orders_3d_flat": float((reward(solid) > reward(flat)).double().mean()),
        "spoiling_pays": float((spoiled > reward(solid)).double().mean()),
        "difference_3d": float(reward(solid).mean()),
        "difference_flat": float(reward(flat).mean()),
        "difference_spoiled_flat": float(spoiled.mean()),
        "subject_top5": float(found.double().mean()),
    }


def _config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(
        text_config=text, vision_config=VISION | {"image_size": SIZE_PX, "patch_size": 8}, projection_dim=96
    )


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Return unit vectors (batch, 96) of images (batch, 3, 64, 64) in [-1, 1]."""
    return normalize(model.visual_projection(model.vision_model(images).pooler_output).float(), dim=-1)


def embed_texts(model: CLIPModel, tokens: dict[str, Tensor]) -> Tensor:
    """Return unit vectors (batch, 96) of tokenized texts."""
    return normalize(model.text_projection(model.text_model(**tokens).pooler_output).float(), dim=-1)


def tokens(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """Return token ids and mask of the captions, padded to MAX_LENGTH."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    return {name: each.to(device) for name, each in ids.items()}
