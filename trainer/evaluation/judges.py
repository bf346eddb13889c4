"""Judge images by models independent of the reward: a style classifier, a subject embedder, distances to real pictures.

The judges share nothing with the reward and give no gradient, so they reveal a policy that pleases the reward without
doing what was asked (reward hacking). They read the same 8-bit images as people do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

NUM_NEAREST = 5  # subject_top5
_REFERENCE = "reference.safetensors"


def is_among_nearest(embeddings: Tensor, references: Tensor, right: Tensor, num_nearest: int) -> Tensor:
    """Return 1 for each embedding whose right reference is among its nearest by cosine, else 0: (n,).

    embeddings: (n, e). references: (m, e). right: the row of the right reference for each embedding, (n,).
    """
    similarities = F.normalize(embeddings, dim=1) @ F.normalize(references, dim=1).T
    nearest = similarities.topk(min(num_nearest, len(references)), dim=1).indices
    return (nearest == right[:, None]).any(dim=1).double()


class Judges:
    """A style classifier and a subject embedder, with `references`, the numbers of real pictures (style_references)."""

    def __init__(self, style: Any, subject: Any, folder: Path) -> None:
        self._style, self._subject, self.references = style, subject, style_references(folder)
        self._embeddings = load_file(folder / _REFERENCE)["subject.embeddings"]
        self._row_of = {label: row for row, label in enumerate(self.subjects(folder))}

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Judges:
        """Load style/, subject/ and reference.safetensors. Raise FileNotFoundError, naming evaluation.judge_path."""
        if not (folder / _REFERENCE).is_file():
            raise FileNotFoundError(f"evaluation.judge_path {folder} has no {_REFERENCE}: give another, or null")
        style, subject = (  # dtype: on disk they may have another
            kind.from_pretrained(folder / name, dtype=torch.float32).eval().to(device)
            for name, kind in (("style", AutoModelForImageClassification), ("subject", AutoModel))
        )
        return cls(style, subject, folder)

    @staticmethod
    def subjects(folder: Path) -> list[str]:
        """Return the subjects that the judges in `folder` know, in the order of their embeddings."""
        with safe_open(folder / _REFERENCE, framework="pt") as file:
            subjects: list[str] = json.loads(file.metadata()["subjects"])
        return subjects

    @staticmethod
    def metrics(folder: Path) -> set[str]:
        """Return the names of the numbers that the judges in `folder` give, without loading them."""
        return {*(f"style_share_{name}" for name in _styles(folder)), *style_references(folder), "subject_top5"}

    @torch.no_grad()
    def judge(
        self, images: Tensor, prompts: Sequence[str], batch: int, candidates: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Judge each image: return values (num_images,) by metric name, and the style judge's features (num_images, d).

        A value is 1 or 0: whether the image has a style, or its subject is recognized among `candidates`, which are
        `prompts` unless given. Raises ValueError for a candidate that is no known subject.
        """
        pooled = self._pooled(images, batch)
        styles = self._style.classifier(pooled).argmax(dim=1).cpu()
        values = {
            f"style_share_{name}": (styles == index).double() for index, name in self._style.config.id2label.items()
        }
        embeddings = [self._subject(_pixels(chunk, self._subject)).pooler_output for chunk in images.split(batch)]
        recognized = self._recognized(torch.cat(embeddings).flatten(1).cpu(), prompts, candidates or prompts)
        return values | {"subject_top5": recognized}, pooled.flatten(1).cpu()

    @torch.no_grad()
    def features(self, images: Tensor, batch: int) -> Tensor:
        """Return the style judge's features (num_images, d) of uint8 images."""
        return self._pooled(images, batch).flatten(1).cpu()

    @torch.no_grad()
    def subject_similarity(self, images: Tensor, others: Tensor, batch: int) -> Tensor:
        """Return the cosine of the subject embeddings of uint8 images, one to one, (num_images,)."""
        embeddings, other_embeddings = (
            torch.cat([self._subject(_pixels(chunk, self._subject)).pooler_output for chunk in each.split(batch)])
            for each in (images, others)
        )
        return F.cosine_similarity(embeddings.flatten(1), other_embeddings.flatten(1)).cpu()

    def _pooled(self, images: Tensor, batch: int) -> Tensor:
        parts = [self._style.base_model(_pixels(chunk, self._style)).pooler_output for chunk in images.split(batch)]
        return torch.cat(parts)

    def _recognized(self, embeddings: Tensor, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
        if unknown := sorted(set(candidates) - self._row_of.keys()):
            raise ValueError(f"evaluation.judge_path knows no subject {unknown[0]!r} ({len(unknown)} are unknown)")
        place_of = {label: place for place, label in enumerate(dict.fromkeys(candidates))}
        references = self._embeddings[[self._row_of[label] for label in place_of]].float()
        right = torch.tensor([place_of[prompt] for prompt in prompts])
        return is_among_nearest(embeddings, references, right, NUM_NEAREST)


def style_references(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean (d,) and covariance (d, d) of the features of each style's real pictures, by the distance's metric.

    A class without real pictures, such as "Spoiled", has none.
    """
    reference = load_file(folder / _REFERENCE)
    return {
        f"frechet_{name}": (reference[f"style.{name}.mean"], reference[f"style.{name}.covariance"])
        for name in _styles(folder)
        if f"style.{name}.mean" in reference
    }


def _styles(folder: Path) -> list[str]:
    return list(json.loads((folder / "style" / "config.json").read_text(encoding="utf-8"))["id2label"].values())


def _pixels(images: Tensor, judge: Any) -> Tensor:
    """Return uint8 images as a judge takes them: image_size squared, in [−1, 1]."""
    size, device = judge.config.image_size, next(judge.parameters()).device
    floats = images.to(device).float() / 255
    if floats.shape[2:] != (size, size):
        floats = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True)
    return (floats - 0.5) / 0.5
