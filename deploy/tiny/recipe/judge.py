"""Train two judges, for evaluation only: a style classifier with a class for spoiled pictures, and a subject embedder.

Both are small ResNets. They share only the drawings with the reward: architecture, loss and seed differ, and they read
no text. Beside them, `reference.safetensors` holds for each style the mean and covariance of the classifier's features
over the held-out drawings, and the embedding of every subject.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy, normalize
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from deploy.tiny.recipe import augment
from deploy.tiny.recipe.data import SIZE_PX, STYLES, Emoji, to_float
from deploy.tiny.recipe.fit import Settings, Step, fit
from deploy.tiny.recipe.subjects import choose, classifiable
from deploy.tiny.recipe.views import look_up

STYLE = Settings(seed=30, num_steps=5000, learning_rate=2e-3, ema_decay=0.995, weight_decay=0.05)
SUBJECT = Settings(seed=31, num_steps=5000, learning_rate=2e-3, ema_decay=0.995, weight_decay=0.05)
STYLE_SUBJECTS, NUM_SPOILED = 20, 8  # of a batch: the rarer spoiled pictures are, the fewer good ones pass for them
SUBJECT_BATCH, TEMPERATURE = 64, 0.07
# A strongly disturbed latent is no clean picture of a style, and no spoiled one either: the style judge sees none.
STYLE_VIEWS, SUBJECT_VIEWS = (0.4, 0.4, 0.2, 0.0), (0.3, 0.4, 0.2, 0.1)
CLASSES = (*STYLES, "Spoiled")
SPOILED = len(STYLES)
NET = {"image_size": SIZE_PX, "layer_type": "basic"}
STYLE_NET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 64], "depths": [2, 2, 2, 1]}
SUBJECT_NET = {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}


def train_style(emoji: Emoji, views: Tensor, out: Path, checkpoint: Path) -> None:
    """Train the classifier from scratch and save it to `out`."""
    torch.manual_seed(STYLE.seed)
    names = dict(enumerate(CLASSES))
    config = ResNetConfig(**NET, **STYLE_NET, id2label=names, label2id={name: index for index, name in names.items()})
    training, device = classifiable(emoji, choose(emoji)).to(views.device), views.device

    def loss(net: Any, _: Any, step: Step) -> Tensor:
        subjects = training[torch.randperm(len(training), device=device)[:STYLE_SUBJECTS]]
        styles = torch.arange(len(STYLES), device=device).repeat(len(subjects))
        pictures = augment.flip(look_up(views, subjects.repeat_interleave(len(STYLES)), styles, STYLE_VIEWS))
        pictures = augment.paste(pictures, pictures.roll(len(STYLES), dims=0), 0.5)
        spoiled = augment.spoil(pictures[torch.randperm(len(pictures), device=device)[:NUM_SPOILED]])
        target = torch.cat([styles, torch.full((len(spoiled),), SPOILED, device=device)])
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(torch.cat([pictures, spoiled])).logits
        return cross_entropy(logits.float(), target, label_smoothing=0.05)

    net = fit("style", ResNetForImageClassification(config).to(device), loss, STYLE, checkpoint)
    net.cpu().half().save_pretrained(out)


def train_subject(emoji: Emoji, views: Tensor, out: Path, checkpoint: Path) -> None:
    """Train the embedder to find a subject in another style, and save it to `out`."""
    torch.manual_seed(SUBJECT.seed)
    training, device = classifiable(emoji, choose(emoji)).to(views.device), views.device

    def loss(net: Any, _: Any, step: Step) -> Tensor:
        subjects = training[torch.randperm(len(training), device=device)[:SUBJECT_BATCH]]
        styles = torch.rand(len(subjects), len(STYLES), device=device).argsort(dim=1)[:, :2]
        one, other = (
            embed(net, augment.jitter(look_up(views, subjects, styles[:, side], SUBJECT_VIEWS))) for side in (0, 1)
        )
        logits, target = one @ other.T / TEMPERATURE, torch.arange(len(subjects), device=device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    net = fit("subject", ResNetModel(ResNetConfig(**NET, **SUBJECT_NET)).to(device), loss, SUBJECT, checkpoint)
    net.cpu().half().save_pretrained(out)


@torch.no_grad()
def measure(style: Any, subject: Any, emoji: Emoji, views: Tensor) -> dict[str, float]:
    """Measure on held-out subjects: styles told apart as drawn and through the VAE, spoils seen, subjects found.

    style_clean_called_spoiled: how often the classifier calls a good picture spoiled.
    """
    torch.manual_seed(0)
    pictures = views[choose(emoji).held_out]
    truth = torch.arange(len(STYLES)).expand(len(pictures), -1)
    seen = {name: _styles(style, pictures[:, :, view]) for name, view in (("real", 0), ("vae", 1))}
    numbers = {f"style_{name}": float((found == truth).double().mean()) for name, found in seen.items()}
    fluent = to_float(pictures[:, :2, 1].flatten(0, 1))
    spoiled = torch.cat([style(augment.spoil(fluent)).logits.argmax(dim=-1) for _ in range(4)])
    solid, flat = (embed(subject, to_float(pictures[:, STYLES.index(name), 1])) for name in ("3D", "Flat"))
    found = ((solid @ flat.T).argmax(dim=1) == torch.arange(len(solid))).double()
    return numbers | {
        "style_clean_called_spoiled": float((seen["vae"] == SPOILED).double().mean()),
        "style_spoiled_seen": float((spoiled == SPOILED).double().mean()),
        "subject_top1": float(found.mean()),
    }


@torch.no_grad()
def write_reference(style: Any, subject: Any, emoji: Emoji, out: Path) -> None:
    """Write reference.safetensors, with float32 judges in eval mode."""
    tensors: dict[str, Tensor] = {}
    held_out = choose(emoji).held_out
    for index, name in enumerate(STYLES):
        features = style.resnet(to_float(emoji.images[held_out, index])).pooler_output.flatten(1).double()
        tensors[f"style.{name}.mean"] = features.mean(0)
        tensors[f"style.{name}.covariance"] = features.T.cov()
    embeddings = torch.stack([_embed_all(subject, emoji.images[:, index]) for index in range(len(STYLES))])
    tensors["subject.embeddings"] = normalize(embeddings.mean(0), dim=-1).half()
    save_file(tensors, out, metadata={"subjects": json.dumps(emoji.labels)})


def embed(subject: Module, images: Tensor) -> Tensor:
    """Return unit vectors (batch, 128) of images (batch, 3, 64, 64) in [-1, 1]."""
    return normalize(subject(images).pooler_output.flatten(1), dim=-1)


def _styles(style: Module, pictures: Tensor) -> Tensor:
    """Classify (subjects, styles, 3, 64, 64) uint8: the index of the class, (subjects, styles)."""
    return style(to_float(pictures.flatten(0, 1))).logits.argmax(-1).unflatten(0, pictures.shape[:2])


def _embed_all(subject: Module, pictures: Tensor) -> Tensor:
    return torch.cat([embed(subject, to_float(part)) for part in pictures.split(256)])
