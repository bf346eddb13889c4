"""Pictures of one policy -> its numbers: what rewards, judges and statistics say of each picture and of all together.

    measurer = Measurer({"reward": similarities}, judges, reference_path=None, num_images_per_prompt=2)
    base = measurer.measure(base_images, prompts)
    aligned = measurer.measure(aligned_images, prompts, base)
    measurer.summarize(aligned)["frechet_Flat"]

A row is a picture. The num_images_per_prompt pictures of a prompt follow each other, so that rows can be drawn again
prompt by prompt (bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from trainer.evaluation.judges import Judges, frechet_distance, gaussian_of
from trainer.evaluation.statistics import (
    common_mode,
    diversity,
    feature_distance,
    picture_features,
    picture_statistics,
    pixel_distance,
)

# images (num_images, 3, height, width) uint8 and a prompt each -> similarities (num_images,) under the positive and
# under the negative word
Similarities = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
_STATISTICS = ("saturation", "dark_share", "edge_density", "colour_entropy", "lattice_share")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 32  # pictures measured at a time


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """images (num_images, 3, height, width) uint8; what was seen of each: values (num_images,), features (…, d)."""

    images: Tensor
    values: dict[str, Tensor]
    features: Tensor

    def rows(self, rows: Tensor) -> Measurements:
        """These rows only, in this order; a row may come twice."""
        values = {name: value[rows] for name, value in self.values.items()}
        return Measurements(self.images, values, self.features[rows])


class Measurer:
    """All that measures: rewards by the name of their number ("reward…"), judges, and a folder of real pictures."""

    def __init__(
        self,
        rewards: Mapping[str, Similarities],
        judges: Judges | None,
        reference_path: Path | None,
        num_images_per_prompt: int,
    ) -> None:
        self._rewards, self._judges, self._num_images_per_prompt = rewards, judges, num_images_per_prompt
        self._references = judges.references if judges else {}
        self._reference_path = reference_path

    def measure(self, images: Tensor, prompts: Sequence[str], base: Measurements | None = None) -> Measurements:
        """Look at uint8 images drawn for these prompts, one each; `base`: the base model's, the same prompts and seeds.

        Without `base` they are the base model's own.
        """
        values = self._reward_values(images, prompts) | _by_batch(picture_statistics, images)
        if self._judges is None:
            features = torch.cat([picture_features(chunk) for chunk in images.split(_BATCH)])
        else:
            judged, features = self._judges.look(images, prompts, _BATCH)
            values |= judged
        seen = Measurements(images, values, features)
        base = base or seen
        values["base_pixel_distance"] = torch.cat(
            [pixel_distance(*pair) for pair in zip(images.split(_BATCH), base.images.split(_BATCH), strict=True)]
        )
        values["base_feature_distance"] = feature_distance(features, base.features)
        return seen

    def summarize(self, seen: Measurements) -> dict[str, float]:
        """Means of what was seen of each picture, and what only a set of pictures has."""
        gaussian = gaussian_of(seen.features)
        numbers = {name: float(value.double().mean()) for name, value in seen.values.items()}
        numbers |= {name: frechet_distance(*gaussian, *real) for name, real in self._real(seen).items()}
        by_prompt = seen.features.double().unflatten(0, (-1, self._num_images_per_prompt))
        numbers["diversity_prompts"] = float(diversity(by_prompt[:, 0]))
        if self._num_images_per_prompt > 1:
            numbers["diversity_seeds"] = float(diversity(by_prompt).mean())
        return numbers

    def _real(self, seen: Measurements) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of real pictures' features, by the name of the distance to them."""
        if self._reference_path is not None and "frechet_reference" not in self._references:
            real = read_pictures(self._reference_path, *seen.images.shape[2:])
            features = self._judges.features(real, _BATCH) if self._judges else picture_features(real)
            self._references = {**self._references, "frechet_reference": gaussian_of(features)}
        return self._references

    def _reward_values(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        values = {}
        for name, similarities in self._rewards.items():
            positive, negative = similarities(images, prompts)
            values[name] = positive - negative  # the reward at preference_scale 0
            values[common_mode_name(name)] = common_mode(positive, negative)
        return values


def metric_names(
    rewards: Sequence[str], judge_path: Path | None, reference_path: Path | None, num_images_per_prompt: int
) -> set[str]:
    """The names of all that a measurer measures, without making one."""
    names = {*rewards, *map(common_mode_name, rewards), *_STATISTICS, "diversity_prompts"}
    names |= {"base_pixel_distance", "base_feature_distance"}
    names |= Judges.metrics(judge_path) if judge_path else set()
    names |= {"frechet_reference"} if reference_path else set()
    return names | ({"diversity_seeds"} if num_images_per_prompt > 1 else set())


def common_mode_name(reward: str) -> str:
    """
    >>> common_mode_name("reward"), common_mode_name("reward_hpsv2.1")
    ('common_mode', 'common_mode_hpsv2.1')
    """
    return reward.replace("reward", "common_mode", 1)


def read_pictures(folder: Path, height_px: int, width_px: int) -> Tensor:
    """All pictures of a folder as (num_images, 3, height_px, width_px) uint8, transparency on white.

    Raises ValueError naming the file that is no picture, and what picture_files raises.
    """
    return torch.stack([_read_picture(file, height_px, width_px) for file in picture_files(folder)])


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder by name. Raises ValueError where there is no folder or fewer than two pictures."""
    if not folder.is_dir():
        raise ValueError(f"evaluation.reference_path {folder} is not a folder: give one, or null to do without")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if len(files) < 2:
        raise ValueError(f"evaluation.reference_path {folder} has {len(files)} PNG, JPEG or WebP files, not 2 or more")
    return files


def _read_picture(file: Path, height_px: int, width_px: int) -> Tensor:
    try:
        with PIL.Image.open(file) as opened:
            picture = opened.convert("RGBA")
    except (PIL.UnidentifiedImageError, OSError) as error:
        raise ValueError(f"evaluation.reference_path: {file} is not a picture that can be read: {error}") from error
    flat = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return pil_to_tensor(flat.resize((width_px, height_px), PIL.Image.Resampling.BICUBIC))


def _by_batch(measure: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    parts = [measure(chunk) for chunk in images.split(_BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
