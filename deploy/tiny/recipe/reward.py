"""Pictures and captions with style words -> the embedded reward, a small CLIPModel trained contrastively.

Half of every batch shows the other half's subjects in another style, so the model must learn the style words to tell
the captions apart.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji, to_float
from deploy.tiny.recipe.tokenizers import clip_tokenizer
from deploy.tiny.recipe.views import RECOLOR, sample_views

NUM_STEPS, NUM_SUBJECTS, LEARNING_RATE, EMA_DECAY, MAX_LENGTH = 5500, 32, 1.5e-3, 0.998, 24
PLAIN_SHARE = 0.1  # batches of one picture a subject, captions without style words
FLUENT_SHARE = 0.5  # of the style pairs: 3D and Flat are drawn alike and the hardest to tell apart
VIEW_SHARES = (0.3, 0.3, 0.25, 0.15)
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}


def train(emoji: Emoji, views: Tensor, out: Path) -> None:
    """Train from scratch and save model, tokenizer and image processor to `out`."""
    torch.manual_seed(20)
    rng = random.Random(20)
    tokenizer = clip_tokenizer(emoji, MAX_LENGTH)
    model = CLIPModel(_config(tokenizer))
    ema: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS, pct_start=0.05)
    training = (~emoji.heldout).nonzero().flatten()
    started = time.monotonic()
    for step in range(NUM_STEPS):
        images, captions = _batch(emoji, views, training, rng)
        loss = _contrast(model, images, _tokens(tokenizer, captions))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        with torch.no_grad():
            model.logit_scale.clamp_(max=3.9)  # temperature of 0.02 at the least: a smoother reward to climb
        if step % 250 == 0:
            seconds = time.monotonic() - started
            print(
                f"reward {step}/{NUM_STEPS} loss {loss:.3f} {measure(ema.module, tokenizer, emoji)} {seconds:.0f} s",
                flush=True,
            )
    ema.module.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": SIZE_PX, "width": SIZE_PX}
    CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    ).save_pretrained(out)


@torch.no_grad()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, emoji: Emoji) -> dict[str, float]:
    """Measure on held-out drawings how often a subject's 3D and Flat drawing are ordered as their captions.

    `orders_3d_flat` is the share of subjects for which the difference R("3D. …") - R("Flat. …") is larger on the 3D
    drawing; `subject_top5` the share whose own caption is among the five nearest of all held-out captions.
    """
    heldout = emoji.heldout.nonzero().flatten().tolist()
    labels = [emoji.labels[i] for i in heldout]
    solid, flat = (_embed_images(model, to_float(emoji.images[heldout, STYLES.index(name)])) for name in ("3D", "Flat"))
    difference = _embed_texts(model, _tokens(tokenizer, [f"3D. {label}" for label in labels])) - _embed_texts(
        model, _tokens(tokenizer, [f"Flat. {label}" for label in labels])
    )
    ordered = ((solid - flat) * difference).sum(-1) > 0
    absolute = torch.cat([(solid * difference).sum(-1) > 0, (flat * difference).sum(-1) < 0])
    nearest = (solid @ _embed_texts(model, _tokens(tokenizer, labels)).T).topk(5).indices
    found = (nearest == torch.arange(len(labels))[:, None]).any(-1)
    return {
        "orders_3d_flat": round(float(ordered.float().mean()), 4),
        "right_style_alone": round(float(absolute.float().mean()), 4),
        "subject_top5": round(float(found.float().mean()), 4),
    }


def _config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = VISION | {"image_size": SIZE_PX, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)


def _batch(emoji: Emoji, views: Tensor, training: Tensor, rng: random.Random) -> tuple[Tensor, list[str]]:
    plain = rng.random() < PLAIN_SHARE
    subjects = training[torch.randperm(len(training))[: 2 * NUM_SUBJECTS if plain else NUM_SUBJECTS]]
    if plain:
        styles = torch.randint(len(STYLES), subjects.shape)
        captions = [emoji.caption(subject, rng) for subject in subjects.tolist()]
    else:
        styles = torch.stack([_style_pair() for _ in subjects], dim=1).flatten()
        subjects = subjects.repeat(2)
        captions = [
            f"{STYLES[style]}. {emoji.caption(subject, rng)}"
            for style, subject in zip(styles.tolist(), subjects.tolist(), strict=True)
        ]
    return sample_views(views, subjects, styles, VIEW_SHARES, RECOLOR), captions


def _style_pair() -> Tensor:
    if torch.rand(()) < FLUENT_SHARE:
        return torch.tensor([STYLES.index("3D"), STYLES.index("Flat")])[torch.randperm(2)]
    return torch.randperm(len(STYLES))[:2]


def _contrast(model: CLIPModel, images: Tensor, tokens: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        image, text = _embed_images(model, images), _embed_texts(model, tokens)
    logits = model.logit_scale.exp() * image.float() @ text.float().T
    target = torch.arange(len(logits))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    return normalize(model.visual_projection(model.vision_model(images).pooler_output).float(), dim=-1)


def _embed_texts(model: CLIPModel, tokens: dict[str, Tensor]) -> Tensor:
    return normalize(model.text_projection(model.text_model(**tokens).pooler_output).float(), dim=-1)


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))
