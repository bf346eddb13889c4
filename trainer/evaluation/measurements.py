"""Measure the images of one policy: collect the values of rewards, judges and statistics, and reduce them to numbers.

    measurer = Measurer({"reward": similarities}, judges, reference_path=None, num_images_per_prompt=2)
    base = measurer.measure(base_images, prompts)
    aligned = measurer.measure(aligned_images, prompts, base)
    measurer.summarize(aligned)["frechet_Flat"]

A row is an image. The num_images_per_prompt images of a prompt are consecutive, so that the bootstrap can draw rows
prompt by prompt (bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.evaluation.damage import THRESHOLDS, changes, damage
from trainer.evaluation.judges import Judges, frechet_distance, gaussian_of
from trainer.evaluation.paired import PAIRED, correlation, hue_distance, paired_values
from trainer.evaluation.real_pictures import read_pictures
from trainer.evaluation.statistics import (
    common_mode,
    diversity,
    edge_strength,
    feature_distance,
    picture_features,
    picture_statistics,
    pixel_distance,
)

# images (num_images, 3, height, width) uint8 with one prompt for each -> similarities (num_images,) under the positive
# and under the negative word
Similarities = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
_STATISTICS = (
    "saturation", "dark_share", "edge_density", "color_entropy", "lattice_share", "contrast", "sharpness",
    "local_entropy",
)  # fmt: skip
_DRIFTS = ("base_pixel_distance", "base_feature_distance", "base_edge_correlation", "base_hue_distance")
SUBJECT_SIMILARITY = "truth_subject_similarity"
_BATCH = 32  # images measured at a time


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Images (num_images, 3, height, width) uint8, with values (num_images,) by name and features (num_images, d)."""

    images: Tensor
    values: dict[str, Tensor]
    features: Tensor

    def rows(self, rows: Tensor) -> Measurements:
        """Return the values and features of these rows, in this order; a row may occur twice."""
        values = {name: value[rows] for name, value in self.values.items()}
        return Measurements(self.images, values, self.features[rows])


class Measurer:
    """Measures images by rewards (whose metrics begin with "reward"), judges, and real pictures.

    reference_path: a folder of real pictures, of which the distribution counts. truth: the real picture of each prompt,
    (3, height, width) uint8. batch: the images that judges see at once.
    """

    def __init__(
        self,
        rewards: Mapping[str, Similarities],
        judges: Judges | None,
        reference_path: Path | None,
        num_images_per_prompt: int,
        truth: Mapping[str, Tensor] | None = None,
        batch: int = _BATCH,
    ) -> None:
        self._rewards, self._judges, self._num_images_per_prompt = rewards, judges, num_images_per_prompt
        self._truth, self._batch = truth, batch
        self._references = judges.references if judges else {}
        self._reference_path = reference_path

    def measure(self, images: Tensor, prompts: Sequence[str], base: Measurements | None = None) -> Measurements:
        """Measure uint8 images, drawn for one prompt each.

        `base` are the measurements of the base model's images, for the same prompts and seeds. Without `base` the
        images are the base model's own.
        """
        values = self._reward_values(images, prompts) | _by_batch(picture_statistics, images)
        if self._judges is None:
            features = torch.cat([picture_features(chunk) for chunk in images.split(_BATCH)])
        else:
            judge_values, features = self._judges.judge(images, prompts, self._batch)
            values |= judge_values
        if self._truth is not None:
            values |= self._compare(images, torch.stack([self._truth[prompt] for prompt in prompts]))
        measurements = Measurements(images, values, features)
        base = base or measurements
        values |= _drifts(images, base.images)
        values["base_feature_distance"] = feature_distance(features, base.features)
        return measurements

    def summarize(self, measurements: Measurements) -> dict[str, float]:
        """Return the means of all values, and the numbers of the whole set: Fréchet distances and diversity."""
        gaussian = gaussian_of(measurements.features)
        numbers = {name: float(value.double().mean()) for name, value in measurements.values.items()}
        numbers |= {
            name: frechet_distance(*gaussian, *real) for name, real in self._reference_gaussians(measurements).items()
        }
        numbers["damage"] = damage(numbers)
        by_prompt = measurements.features.double().unflatten(0, (-1, self._num_images_per_prompt))
        numbers["diversity_prompts"] = float(diversity(by_prompt[:, 0]))
        if self._num_images_per_prompt > 1:
            numbers["diversity_seeds"] = float(diversity(by_prompt).mean())
        return numbers

    def _reference_gaussians(self, measurements: Measurements) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return mean and covariance of real pictures' features, by the metric name of the distance to them."""
        if self._reference_path is not None and "frechet_reference" not in self._references:
            real = read_pictures(self._reference_path, *measurements.images.shape[2:])
            features = self._judges.features(real, self._batch) if self._judges else picture_features(real)
            self._references = {**self._references, "frechet_reference": gaussian_of(features)}
        return self._references

    def _compare(self, images: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Return the distances of images to the real pictures of their prompts."""
        values = paired_values(images, real)
        if self._judges is None:
            return values
        return values | {SUBJECT_SIMILARITY: self._judges.subject_similarity(images, real, self._batch)}

    def _reward_values(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        values = {}
        for name, similarities in self._rewards.items():
            positive, negative = similarities(images, prompts)
            values[name] = positive - negative  # the reward at preference_scale 0
            values[common_mode_name(name)] = common_mode(positive, negative)
        return values


def metric_names(
    rewards: Sequence[str],
    judge_path: Path | None,
    reference_path: Path | None,
    num_images_per_prompt: int,
    has_truth: bool = False,
) -> set[str]:
    """Return the names of all numbers that a Measurer with these arguments gives, without making one."""
    names = {*rewards, *map(common_mode_name, rewards), *_STATISTICS, "diversity_prompts"}
    names |= {*_DRIFTS, *THRESHOLDS, "damage"}
    names |= Judges.metrics(judge_path) if judge_path else set()
    names |= {"frechet_reference"} if reference_path else set()
    names |= {*PAIRED, *([SUBJECT_SIMILARITY] if judge_path else [])} if has_truth else set()
    return names | ({"diversity_seeds"} if num_images_per_prompt > 1 else set())


def common_mode_name(reward: str) -> str:
    """Return the name of the common mode that belongs to a reward's metric.

    >>> common_mode_name("reward"), common_mode_name("reward_hpsv2.1")
    ('common_mode', 'common_mode_hpsv2.1')
    """
    return reward.replace("reward", "common_mode", 1)


def _drifts(images: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Return how far images are from the base model's of the same prompts and seeds: pixels, structure, colors."""
    parts = []
    for chunk, base_chunk in zip(images.split(_BATCH), base.split(_BATCH), strict=True):
        pixels, before = chunk.double() / 255, base_chunk.double() / 255
        parts.append(
            {
                "base_pixel_distance": pixel_distance(chunk, base_chunk),
                "base_edge_correlation": correlation(edge_strength(pixels), edge_strength(before)),
                "base_hue_distance": hue_distance(pixels, before),
                **changes(chunk, base_chunk),
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _by_batch(measure: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Apply `measure` to _BATCH images at a time, and join the values."""
    parts = [measure(chunk) for chunk in images.split(_BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
