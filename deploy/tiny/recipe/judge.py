"""Pictures -> two judges, for evaluation only: a style classifier and a subject embedder, both small ResNets.

They share only the drawings with the reward: architecture, loss and seed differ, and they read no text. Beside them,
`reference.safetensors` holds for each style the mean and covariance of the classifier's features over the held-out
drawings, and the embedding of every subject.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy, normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji, to_float
from deploy.tiny.recipe.views import FLIP, sample_views

STYLE_STEPS, SUBJECT_STEPS, BATCH, LEARNING_RATE, EMA_DECAY, TEMPERATURE = 4500, 3500, 64, 2e-3, 0.995, 0.07
STYLE_VIEW_SHARES = (0.45, 0.35, 0.15, 0.05)
STYLE_NET = {
    "image_size": SIZE_PX,
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 64],
    "depths": [2, 2, 2, 1],
    "layer_type": "basic",
}
SUBJECT_NET = {
    "image_size": SIZE_PX,
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 96, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def train_style(emoji: Emoji, views: Tensor, out: Path) -> None:
    """Train the classifier from scratch and save it to `out`."""
    torch.manual_seed(30)
    names = dict(enumerate(STYLES))
    config = ResNetConfig(**STYLE_NET, id2label=names, label2id={name: index for index, name in names.items()})

    def loss(net: Module, subjects: Tensor) -> Tensor:
        styles = torch.arange(len(STYLES)).repeat(BATCH // len(STYLES))
        subjects = subjects[: BATCH // len(STYLES)].repeat_interleave(len(STYLES))
        pictures = sample_views(views, subjects, styles, STYLE_VIEW_SHARES, FLIP)  # more jitter: a worse judge
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(_paste(pictures, pictures.roll(len(STYLES), dims=0))).logits
        return cross_entropy(logits.float(), styles, label_smoothing=0.05)

    _fit("style", ResNetForImageClassification(config), loss, emoji, STYLE_STEPS).half().save_pretrained(out)


def _paste(pictures: Tensor, others: Tensor) -> Tensor:
    """Paste into half of the pictures a box of another picture of the same style, which both parts then share.

    This is CutMix (Yun et al., arXiv 1905.04899) with one label.
    """
    pasted = pictures.clone()
    for index in (torch.rand(len(pictures)) < 0.5).nonzero().flatten():
        height, width = torch.randint(SIZE_PX // 4, SIZE_PX * 3 // 4 + 1, (2,)).tolist()
        top, left = (int(torch.randint(SIZE_PX - side + 1, ())) for side in (height, width))
        box = (index, slice(None), slice(top, top + height), slice(left, left + width))
        pasted[box] = others[box]
    return pasted


def train_subject(emoji: Emoji, views: Tensor, out: Path) -> None:
    """Train the embedder from scratch and save it to `out`."""
    torch.manual_seed(31)

    def loss(net: Module, subjects: Tensor) -> Tensor:
        styles = torch.stack([torch.randperm(len(STYLES))[:2] for _ in subjects], dim=1)
        one, other = (embed(net, sample_views(views, subjects, styles[side])) for side in (0, 1))
        target = torch.arange(len(subjects))
        logits = one @ other.T / TEMPERATURE
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    _fit("subject", ResNetModel(ResNetConfig(**SUBJECT_NET)), loss, emoji, SUBJECT_STEPS).half().save_pretrained(out)


@torch.no_grad()
def measure(style: Module, subject: Module, emoji: Emoji, views: Tensor) -> dict[str, float]:
    """Measure held-out accuracy over the four styles, as drawn and through the VAE, and retrieval of Flat by 3D."""
    pictures = views[emoji.heldout]
    truth = torch.arange(len(STYLES)).expand(len(pictures), -1)
    share = {
        name: float((_logits(style, pictures[:, :, view]) == truth).float().mean())
        for name, view in (("style_real", 0), ("style_vae", 1))
    }
    solid, flat = (embed(subject, to_float(pictures[:, STYLES.index(name), 1])) for name in ("3D", "Flat"))
    found = ((solid @ flat.T).topk(5).indices == torch.arange(len(solid))[:, None]).any(-1)
    return {name: round(value, 4) for name, value in (share | {"subject_top5": float(found.float().mean())}).items()}


@torch.no_grad()
def write_reference(style: Any, subject: Any, emoji: Emoji, out: Path) -> None:
    """Write reference.safetensors, with float32 judges in eval mode."""
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(STYLES):
        features = style.resnet(to_float(emoji.images[emoji.heldout, index])).pooler_output.flatten(1).double()
        tensors[f"style.{name}.mean"] = features.mean(0)
        tensors[f"style.{name}.covariance"] = features.T.cov()
    embeddings = torch.stack([_embed_all(subject, emoji.images[:, index]) for index in range(len(STYLES))])
    tensors["subject.embeddings"] = normalize(embeddings.mean(0), dim=-1).half()
    save_file(tensors, out, metadata={"subjects": json.dumps(emoji.labels)})


def reference_embeddings(path: Path) -> Tensor:
    return load_file(path)["subject.embeddings"].float()


def _fit(name: str, net: Module, loss_of: Callable[[Module, Tensor], Tensor], emoji: Emoji, num_steps: int) -> Any:
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.05)
    training = (~emoji.heldout).nonzero().flatten()
    started = time.monotonic()
    for step in range(num_steps):
        loss = loss_of(net, training[torch.randperm(len(training))[:BATCH]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update_parameters(net)
        if step % 250 == 0:
            print(f"judge {name} {step}/{num_steps} loss {loss:.3f} {time.monotonic() - started:.0f} s", flush=True)
    return ema.module.eval()


def _logits(style: Module, pictures: Tensor) -> Tensor:
    """Classify (subjects, styles, 3, 64, 64) uint8: the index of the style, (subjects, styles)."""
    return style(to_float(pictures.flatten(0, 1))).logits.argmax(-1).unflatten(0, pictures.shape[:2])


def embed(subject: Module, images: Tensor) -> Tensor:
    return normalize(subject(images).pooler_output.flatten(1), dim=-1)


def _embed_all(subject: Module, pictures: Tensor) -> Tensor:
    return torch.cat([embed(subject, to_float(part)) for part in pictures.split(256)])
