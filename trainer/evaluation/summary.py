"""Reduce the values and features of images to numbers, of the whole set and of every draw of its prompts.

A draw is given by how often it has each prompt. So no row is copied: what depends on images or on pairs of them is
computed once, and a draw is a weighted sum. Only a Fréchet distance needs more (frechet.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.evaluation.damage import THRESHOLDS
from trainer.evaluation.frechet import frechet_distances
from trainer.evaluation.statistics import distances, diversity


def summarize_draws(
    values: Mapping[str, Tensor], features: Tensor, counts: Tensor, references: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the means of all values, Fréchet distances, damage and diversity of each draw, (num_draws,) by name.

    values: (num_images,) by metric name. features: (num_images, d). counts: how often each draw has each prompt,
    (num_draws, num_prompts), all prompts alike with their images, which are consecutive rows. references: mean (d,) and
    covariance (d, d) of real pictures' features, by the name of the distance to them. Raises ValueError for fewer than
    two prompts.
    """
    num_prompts = counts.shape[1]
    if num_prompts < 2:
        raise ValueError(f"{num_prompts} prompt has no diversity: evaluation.prompts_path needs two prompts or more")
    counts, features = counts.double(), features.double()
    by_prompt = features.unflatten(0, (num_prompts, -1))
    num_each = by_prompt.shape[1]
    of_images = counts.repeat_interleave(num_each, dim=1)
    means = of_images @ torch.stack([each.double() for each in values.values()], dim=1) / of_images.sum(1, keepdim=True)
    numbers = dict(zip(values, means.unbind(dim=1), strict=True))
    numbers |= {name: frechet_distances(features, of_images, *real) for name, real in references.items()}
    numbers["damage"] = torch.stack([numbers[name] / limit for name, limit in THRESHOLDS.items()]).amax(dim=0)
    between = ((counts @ distances(by_prompt[:, 0])) * counts).sum(dim=1)
    numbers["diversity_prompts"] = between / (num_prompts * (num_prompts - 1))
    if num_each > 1:
        numbers["diversity_seeds"] = counts @ diversity(by_prompt) / num_prompts
    return numbers
