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
from typing import Any, Protocol

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from services.config.run import RunConfig
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward
from trainer.algorithm.rollout import Sampling, sample
from trainer.data.prompt_files import load_prompts
from trainer.draws import evaluation_generator
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

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


def is_among_nearest(embeddings: Tensor, references: Tensor, right: Tensor, num_nearest: int) -> Tensor:
    """(n,): 1 where an embedding's (n, e) right row of references (m, e) is among its nearest by cosine, else 0."""
    similarities = F.normalize(embeddings, dim=1) @ F.normalize(references, dim=1).T
    nearest = similarities.topk(min(num_nearest, len(references)), dim=1).indices
    return (nearest == right[:, None]).any(dim=1).double()


class Scores(Protocol):
    """What answers reward requests: RewardClient, or a scorer in the same process."""

    def score(self, request: RewardRequest, /) -> RewardResponse: ...


def similarities(
    client: Scores, config: RunConfig, reward: str, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Of images (num_images, 3, height, width) uint8 to their prompts: (num_images,) under positive and negative word.

    The words are the reward's own where the run trains on it and gives it some, else the run's. Their difference is the
    reward at preference_scale 0; a scale above 0 would reward the subject as well.
    """
    words = {each.name: each.control_words for each in config.rewards}.get(reward) or config.control_words
    asked, batch, positive, negative = (WeightedReward(reward),), config.evaluation.batch, [], []
    for start in range(0, len(images), batch):
        pairs = tuple(PromptPair(each, words.positive, words.negative) for each in prompts[start : start + batch])
        chunk = (images[start : start + batch].float() / 255).numpy()
        response = client.score(RewardRequest(chunk, pairs, (0.0,) * len(pairs), asked, with_gradient=False))
        positive.append(torch.tensor(response.positive_similarities[0]))
        negative.append(torch.tensor(response.negative_similarities[0]))
    return torch.cat(positive), torch.cat(negative)


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


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What every evaluation of a run draws: one prompt an image (repeats get noise of their own), in fixed order."""

    prompts: tuple[str, ...]
    seed: int
    batch: int
    sampling: Sampling
    generator: Callable[[int, int], torch.Generator] = evaluation_generator  # of (seed, image_index)

    def shard(self, num_images: int, rank: int, world_size: int) -> list[int]:
        """The indices that one worker draws of the first `num_images`: every world_size-th, the last one filling up.

        Shards are equally long: ZeRO stage 3 needs as many forwards on every worker, and a gather equal shapes.
        """
        num_rounds = math.ceil(num_images / world_size)
        return [min(rank + turn * world_size, num_images - 1) for turn in range(num_rounds)]

    def draw(
        self,
        policy: Policy,
        encode: Callable[[Sequence[str]], Conditioning],
        num_images: int,
    ) -> Tensor | None:
        """The first `num_images` images, (num_images, 3, height, width) uint8 on worker 0 and None on the others.

        Called on all workers at once; `encode` gives the conditioning of prompts of this worker's shard.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        indices = self.shard(num_images, rank, world_size)
        chunks = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        images = torch.cat([self._draw_chunk(policy, encode, chunk) for chunk in chunks])
        parts = [torch.empty_like(images) for _ in range(world_size)] if rank == 0 else None
        dist.gather(images, parts)
        return torch.stack(parts, dim=1).flatten(0, 1)[:num_images].cpu() if parts else None

    def draw_here(self, policy: Policy, encode: Callable[[Sequence[str]], Conditioning]) -> Tensor:
        """All images, (num_images, 3, height, width) uint8, by this process alone."""
        indices = range(len(self.prompts))
        chunks = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        return torch.cat([self._draw_chunk(policy, encode, chunk) for chunk in chunks]).cpu()

    @torch.no_grad()
    def _draw_chunk(
        self,
        policy: Policy,
        encode: Callable[[Sequence[str]], Conditioning],
        indices: Sequence[int],
    ) -> Tensor:
        size = self.sampling.height_px, self.sampling.width_px
        noise = policy.draw_noise([self.generator(self.seed, index) for index in indices], *size)
        conditioning = encode([self.prompts[index] for index in indices])
        return to_uint8(policy.decode_image(sample(policy, conditioning, noise, self.sampling), *size))


def held_out_images(config: RunConfig, shift: float) -> HeldOut:
    """The images of an evaluation: every held-out prompt, num_images_per_prompt times."""
    evaluation, size = config.evaluation, (config.model.height_px, config.model.width_px)
    labels = load_prompts(evaluation.prompts_path, config.prompts.column)
    prompts = tuple(label for label in labels for _ in range(evaluation.num_images_per_prompt))
    sampling = Sampling(evaluation.num_steps, evaluation.guidance_scale, shift, *size)
    return HeldOut(prompts, config.seed, evaluation.batch, sampling)


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
    """Images in [0, 1] rounded to 8 bits, laid out as files want them: an autoencoder's have the channels last."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8, memory_format=torch.contiguous_format)


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
