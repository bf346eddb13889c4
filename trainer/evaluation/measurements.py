"""Measure the images of one policy: collect the values of rewards, judges and statistics, image by image.

    measurer = Measurer({"reward": similarities}, judges, reference_path=None, num_images_per_prompt=2)
    base = measurer.measure(base_images, prompts)
    aligned = measurer.measure(aligned_images, prompts, base)
    measurer.summarize(aligned)["frechet_Flat"]

A row is an image. Any part of the rows can be measured apart from the others (shared_measurer.py does), because only
`summarize` looks at the whole set. The num_images_per_prompt images of a prompt are consecutive (summary.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.evaluation.damage import THRESHOLDS, changes
from trainer.evaluation.frechet import gaussian_of
from trainer.evaluation.judges import Judges
from trainer.evaluation.paired import PAIRED, correlation, hue_distance, paired_values
from trainer.evaluation.real_pictures import picture_files, read_pictures
from trainer.evaluation.statistics import (
    common_mode,
    edge_strength,
    feature_distance,
    picture_features,
    picture_statistics,
    pixel_distance,
)
from trainer.evaluation.summary import summarize_draws

# images (num_images, 3, height, width) uint8 with one prompt for each -> similarities (num_images,) under the positive
# and under the negative word
Similarities = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
_STATISTICS = (
    "saturation", "dark_share", "edge_density", "color_entropy", "lattice_share", "contrast", "sharpness",
    "local_entropy",
)  # fmt: skip
_DRIFTS = ("base_pixel_distance", "base_feature_distance", "base_edge_correlation", "base_hue_distance")
SUBJECT_SIMILARITY = "truth_subject_similarity"
REFERENCE = "frechet_reference"
_BATCH = 32  # images measured at a time


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Images (num_images, 3, height, width) uint8, with values (num_images,) by name and features (num_images, d)."""

    images: Tensor
    values: dict[str, Tensor]
    features: Tensor

    @classmethod
    def join(cls, parts: Sequence[Measurements], rows: Sequence[int] = ()) -> Measurements:
        """Return the rows of all parts, in this order, or sorted by the `rows` of the whole set that they are."""
        order = torch.tensor(rows).argsort() if rows else slice(None)
        return cls(
            torch.cat([part.images for part in parts])[order],
            {name: torch.cat([part.values[name] for part in parts])[order] for name in parts[0].values},
            torch.cat([part.features for part in parts])[order],
        )


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
        self._reference_path = reference_path
        self.references = judges.references if judges else {}

    def measure(
        self,
        images: Tensor,
        prompts: Sequence[str],
        base: Measurements | None = None,
        candidates: Sequence[str] = (),
    ) -> Measurements:
        """Measure uint8 images, drawn for one prompt each.

        `base` are the measurements of the base model's images, for the same prompts and seeds; its values are not used.
        Without `base` the images are the base model's own. `candidates` are the prompts of the whole set of which these
        are a part.
        """
        values = self._reward_values(images, prompts) | _by_batch(picture_statistics, images)
        if self._judges is None:
            features = self.features(images)
        else:
            judge_values, features = self._judges.judge(images, prompts, self._batch, candidates)
            values |= judge_values
        if self._truth is not None:
            values |= self._compare(images, torch.stack([self._truth[prompt] for prompt in prompts]))
        measurements = Measurements(images, values, features)
        base = base or measurements
        values |= _drifts(images, base.images)
        values["base_feature_distance"] = feature_distance(features, base.features)
        return measurements

    def features(self, images: Tensor) -> Tensor:
        """Return the features (num_images, d) of uint8 images: the style judge's, without judges picture_features."""
        if self._judges is not None:
            return self._judges.features(images, self._batch)
        return torch.cat([picture_features(chunk) for chunk in images.split(_BATCH)])

    def summarize(self, measurements: Measurements) -> dict[str, float]:
        """Return the means of all values, and the numbers of the whole set: Fréchet distances, damage, diversity."""
        if self._reference_path is not None and REFERENCE not in self.references:
            size = measurements.images.shape[2:]
            self.use_reference(self.reference_features(chunk, *size) for chunk in self.reference_chunks())
        whole = torch.ones(1, len(measurements.features) // self._num_images_per_prompt)
        numbers = summarize_draws(measurements.values, measurements.features, whole, self.references)
        return {name: float(number) for name, number in numbers.items()}

    def reference_chunks(self) -> list[list[Path]]:
        """Return the files of the folder of real pictures, as many at a time as judges see at once; none without it."""
        files = picture_files(self._reference_path) if self._reference_path is not None else []
        return [files[start : start + self._batch] for start in range(0, len(files), self._batch)]

    def reference_features(self, files: Sequence[Path], height_px: int, width_px: int) -> Tensor:
        """Return the features (num_files, d) of real pictures, cropped to the shape of the images."""
        return self.features(read_pictures(files, height_px, width_px))

    def use_reference(self, features: Iterable[Tensor]) -> None:
        """Measure the distance to the real pictures with these features (…, d), which are all of reference_chunks."""
        self.references = {**self.references, REFERENCE: gaussian_of(torch.cat(list(features)))}

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
    names |= {REFERENCE} if reference_path else set()
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
