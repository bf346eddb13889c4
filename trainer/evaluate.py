"""Fixed prompts and seeds -> images, their reward, what independent judges say of them, and picture grids.

The judges never give a gradient and share nothing with the reward, so they see when a policy pleases the reward without
doing what was asked (reward hacking). Every number is taken from the 8-bit images that are also shown to people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification

from trainer.flux import Conditioning, FluxModel
from trainer.prompts import evaluation_generator
from trainer.rollout import Sampling, sample

NUM_NEAREST = 5  # eval/subject_top5
_MIN_TILE_PX = 96  # smaller images are enlarged by a whole factor, so that a person sees them
_CAPTION_PX = 16


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


def share_among_nearest(embeddings: Tensor, references: Tensor, right: Tensor, num_nearest: int) -> float:
    """Share of embeddings (n, e) whose right reference, a row of references (m, e), is among the nearest by cosine."""
    similarities = F.normalize(embeddings, dim=1) @ F.normalize(references, dim=1).T
    nearest = similarities.topk(min(num_nearest, len(references)), dim=1).indices
    return float((nearest == right[:, None]).any(dim=1).double().mean())


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
        with safe_open(folder / "reference.safetensors", framework="pt") as file:
            reference = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
            subjects = json.loads(file.metadata()["subjects"])
        return cls(style, subject, reference, subjects)

    @torch.no_grad()
    def numbers(self, images: Tensor, prompts: Sequence[str], batch: int) -> dict[str, float]:
        """What the judges say of images (num_images, 3, height, width) uint8, drawn for these prompts, one each."""
        seen = [self._look(chunk) for chunk in images.split(batch)]
        styles, features, embeddings = (torch.cat(parts) for parts in zip(*seen, strict=True))
        numbers = self._style_numbers(styles, gaussian_of(features))
        return numbers | {"eval/subject_top5": self._subject_share(embeddings, prompts)}

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Style index (batch,), style features (batch, d) and subject embeddings (batch, e), on the CPU."""
        pooled = self._style.base_model(_pixels(images, self._style)).pooler_output
        styles = self._style.classifier(pooled).argmax(dim=1)
        embeddings = self._subject(_pixels(images, self._subject)).pooler_output
        return styles.cpu(), pooled.flatten(1).cpu(), embeddings.flatten(1).cpu()

    def _style_numbers(self, styles: Tensor, gaussian: tuple[Tensor, Tensor]) -> dict[str, float]:
        numbers = {}
        for index, name in self._style.config.id2label.items():
            real = self._reference[f"style.{name}.mean"], self._reference[f"style.{name}.covariance"]
            numbers[f"eval/style_share_{name}"] = float((styles == index).double().mean())
            numbers[f"eval/frechet_{name}"] = frechet_distance(*gaussian, *real)
        return numbers

    def _subject_share(self, embeddings: Tensor, prompts: Sequence[str]) -> float:
        if unknown := sorted(set(prompts) - self._row_of.keys()):
            raise ValueError(f"evaluation.judge_path knows no subject {unknown[0]!r} ({len(unknown)} are unknown)")
        candidates = list(dict.fromkeys(prompts))
        rows = [self._row_of[label] for label in candidates]
        right = torch.tensor([candidates.index(prompt) for prompt in prompts])
        references = self._reference["subject.embeddings"][rows].float()
        return share_among_nearest(embeddings, references, right, NUM_NEAREST)


def _pixels(images: Tensor, judge: Any) -> Tensor:
    """uint8 images as a judge takes them: image_size squared, in [−1, 1]."""
    size, device = judge.config.image_size, next(judge.parameters()).device
    floats = images.to(device).float() / 255
    if floats.shape[2:] != (size, size):
        floats = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True)
    return (floats - 0.5) / 0.5


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What every evaluation of a run draws: one prompt an image (repeats get noise of their own), in fixed order."""

    prompts: tuple[str, ...]
    seed: int
    batch: int
    sampling: Sampling

    def shard(self, num_images: int, rank: int, world_size: int) -> list[int]:
        """The indices that one worker draws of the first `num_images`: every world_size-th, the last one filling up.

        Shards are equally long: ZeRO stage 3 needs as many forwards on every worker, and a gather equal shapes.
        """
        num_rounds = math.ceil(num_images / world_size)
        return [min(rank + turn * world_size, num_images - 1) for turn in range(num_rounds)]

    def draw(
        self,
        policy: nn.Module,
        flux: FluxModel,
        encode: Callable[[Sequence[str]], Conditioning],
        num_images: int,
    ) -> Tensor | None:
        """The first `num_images` images, (num_images, 3, height, width) uint8 on worker 0 and None on the others.

        Called on all workers at once; `encode` gives the conditioning of prompts of this worker's shard.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        indices = self.shard(num_images, rank, world_size)
        chunks = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        images = torch.cat([self._draw_chunk(policy, flux, encode, chunk) for chunk in chunks])
        parts = [torch.empty_like(images) for _ in range(world_size)] if rank == 0 else None
        dist.gather(images, parts)
        return torch.stack(parts, dim=1).flatten(0, 1)[:num_images].cpu() if parts else None

    @torch.no_grad()
    def _draw_chunk(
        self,
        policy: nn.Module,
        flux: FluxModel,
        encode: Callable[[Sequence[str]], Conditioning],
        indices: Sequence[int],
    ) -> Tensor:
        size = self.sampling.height_px, self.sampling.width_px
        noise = flux.draw_noise([evaluation_generator(self.seed, index) for index in indices], *size)
        conditioning = encode([self.prompts[index] for index in indices])
        return to_uint8(flux.decode_image(sample(policy, flux, conditioning, noise, self.sampling), *size))


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What one policy drew and its numbers: images (num_images, 3, height, width) uint8."""

    images: Tensor
    numbers: dict[str, float]

    def save(self, path: Path) -> None:
        save_file({"images": self.images}, path, metadata={"numbers": json.dumps(self.numbers)})

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("images"), json.loads(file.metadata()["numbers"]))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded to 8 bits."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def picture_grid(images: Tensor, captions: Sequence[str], num_columns: int) -> PIL.Image.Image:
    """Images (num_images, 3, height, width) uint8 in rows, each above its caption."""
    factor = max(1, math.ceil(_MIN_TILE_PX / images.shape[2]))
    height, width = images.shape[2] * factor, images.shape[3] * factor
    num_rows = math.ceil(len(images) / num_columns)
    grid = PIL.Image.new("RGB", (num_columns * width, num_rows * (height + _CAPTION_PX)), "white")
    pen, font = PIL.ImageDraw.Draw(grid), PIL.ImageFont.load_default(size=11)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % num_columns * width, index // num_columns * (height + _CAPTION_PX)
        tile = PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        grid.paste(tile.resize((width, height), PIL.Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + height + 1), _shortened(caption, font, width - 4), fill="black", font=font)
    return grid


def before_after(base: Tensor, aligned: Tensor, prompts: Sequence[str], num_columns: int = 4) -> PIL.Image.Image:
    """Pairs of the same prompt and seed: the base policy's image left, the aligned one's right, then a white gap."""
    pairs = F.pad(torch.cat([base, aligned], dim=3), (0, max(2, base.shape[3] // 16)), value=255)
    return picture_grid(pairs, prompts, num_columns)


def _shortened(text: str, font: Any, width_px: int) -> str:
    while font.getlength(text) > width_px:
        text = text[:-2] + "…"
    return text
