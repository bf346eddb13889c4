"""Ask judges that give no gradient: a style classifier, a subject embedder, and distances to real pictures.

The judges share nothing with the reward, so they see when a policy pleases the reward without doing what was asked
(reward hacking). They read the 8-bit images that people are shown.
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

NUM_NEAREST = 5  # eval/subject_top5


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, means (d,) and covariances (d, d); computed in float64.

    |m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    mean_a, covariance_a, mean_b, covariance_b = (t.double() for t in (mean_a, covariance_a, mean_b, covariance_b))
    # tr (C_a C_b)^½ through the symmetric C_a^½ C_b C_a^½: exact where few images leave a covariance without full rank
    eigenvalues, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def gaussian_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (num_images, d). ValueError for fewer than two images."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} image has no covariance: evaluation.prompts_path needs two prompts or more")
    return features.double().mean(dim=0), torch.cov(features.double().T)


def is_among_nearest(embeddings: Tensor, references: Tensor, right: Tensor, num_nearest: int) -> Tensor:
    """(n,): 1 where an embedding's (n, e) right row of references (m, e) is among its nearest by cosine, else 0."""
    similarities = F.normalize(embeddings, dim=1) @ F.normalize(references, dim=1).T
    nearest = similarities.topk(min(num_nearest, len(references)), dim=1).indices
    return (nearest == right[:, None]).any(dim=1).double()


class Judges:
    """A style classifier and a subject embedder, with what real pictures look like to them."""

    def __init__(self, style: Any, subject: Any, reference: dict[str, Tensor], subjects: list[str]) -> None:
        self._style, self._subject = style, subject
        self._reference, self._row_of = reference, {label: row for row, label in enumerate(subjects)}

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Judges:
        """Read style/, subject/ and reference.safetensors. Raises FileNotFoundError naming evaluation.judge_path."""
        if not (folder / "reference.safetensors").is_file():
            raise FileNotFoundError(f"evaluation.judge_path {folder} has no reference.safetensors: null does without")
        style, subject = (  # of any dtype on disk
            kind.from_pretrained(folder / name, dtype=torch.float32).eval().to(device)
            for name, kind in (("style", AutoModelForImageClassification), ("subject", AutoModel))
        )
        return cls(style, subject, load_file(folder / "reference.safetensors"), cls.subjects(folder))

    @staticmethod
    def subjects(folder: Path) -> list[str]:
        """The subjects that the judges in `folder` know, in the order of their embeddings."""
        with safe_open(folder / "reference.safetensors", framework="pt") as file:
            subjects: list[str] = json.loads(file.metadata()["subjects"])
        return subjects

    @staticmethod
    def metrics(folder: Path) -> set[str]:
        """The names of what the judges in `folder` tell, from their settings alone."""
        labels = json.loads((folder / "style" / "config.json").read_text(encoding="utf-8"))["id2label"].values()
        return {f"{kind}_{name}" for kind in ("style_share", "frechet") for name in labels} | {"subject_top5"}

    @property
    def references(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of the features of real pictures of each style, by the name of the distance to them."""
        return {
            f"frechet_{name}": (self._reference[f"style.{name}.mean"], self._reference[f"style.{name}.covariance"])
            for name in self._style.config.id2label.values()
        }

    def numbers(self, images: Tensor, prompts: Sequence[str], batch: int) -> dict[str, float]:
        """What the judges say of images (num_images, 3, height, width) uint8, drawn for these prompts, one each."""
        values, features = self.look(images, prompts, batch)
        gaussian = gaussian_of(features)
        numbers = {name: float(value.mean()) for name, value in values.items()}
        numbers |= {name: frechet_distance(*gaussian, *real) for name, real in self.references.items()}
        return {f"eval/{name}": number for name, number in numbers.items()}

    @torch.no_grad()
    def look(self, images: Tensor, prompts: Sequence[str], batch: int) -> tuple[dict[str, Tensor], Tensor]:
        """Of each image whether it has a style, or is found as its subject: 0 or 1, (num_images,); and its features.

        The features (num_images, d) are the style judge's. Raises ValueError for a prompt that is no known subject.
        """
        pooled = self._pooled(images, batch)
        styles = self._style.classifier(pooled).argmax(dim=1).cpu()
        values = {
            f"style_share_{name}": (styles == index).double() for index, name in self._style.config.id2label.items()
        }
        embeddings = [self._subject(_pixels(chunk, self._subject)).pooler_output for chunk in images.split(batch)]
        found = self._is_found(torch.cat(embeddings).flatten(1).cpu(), prompts)
        return values | {"subject_top5": found}, pooled.flatten(1).cpu()

    @torch.no_grad()
    def style_log_probability(self, images: Tensor, style: str, batch: int) -> Tensor:
        """log p(style) of each uint8 image, (num_images,): how sure the style judge is."""
        logits = self._style.classifier(self._pooled(images, batch))
        index = {name: int(row) for row, name in self._style.config.id2label.items()}[style]
        return logits.log_softmax(dim=1)[:, index].cpu()

    @torch.no_grad()
    def features(self, images: Tensor, batch: int) -> Tensor:
        """The style judge's features (num_images, d) of uint8 images."""
        return self._pooled(images, batch).flatten(1).cpu()

    def _pooled(self, images: Tensor, batch: int) -> Tensor:
        parts = [self._style.base_model(_pixels(chunk, self._style)).pooler_output for chunk in images.split(batch)]
        return torch.cat(parts)

    def _is_found(self, embeddings: Tensor, prompts: Sequence[str]) -> Tensor:
        if unknown := sorted(set(prompts) - self._row_of.keys()):
            raise ValueError(f"evaluation.judge_path knows no subject {unknown[0]!r} ({len(unknown)} are unknown)")
        candidates = list(dict.fromkeys(prompts))
        rows = [self._row_of[label] for label in candidates]
        right = torch.tensor([candidates.index(prompt) for prompt in prompts])
        references = self._reference["subject.embeddings"][rows].float()
        return is_among_nearest(embeddings, references, right, NUM_NEAREST)


def _pixels(images: Tensor, judge: Any) -> Tensor:
    """uint8 images as a judge takes them: image_size squared, in [−1, 1]."""
    size, device = judge.config.image_size, next(judge.parameters()).device
    floats = images.to(device).float() / 255
    if floats.shape[2:] != (size, size):
        floats = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True)
    return (floats - 0.5) / 0.5
