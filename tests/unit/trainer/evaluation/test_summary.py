"""The numbers of a draw are those of the images that it has, each as often as it has its prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.evaluation.bootstrap import draws_of_prompts
from trainer.evaluation.damage import THRESHOLDS, damage
from trainer.evaluation.frechet import frechet_distances, gaussian_of
from trainer.evaluation.statistics import diversity
from trainer.evaluation.summary import summarize_draws

NUM_PROMPTS = 12


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_each", [1, 3])
def test_numbers_of_a_draw_are_those_of_its_rows(num_each: int) -> None:
    num_images = NUM_PROMPTS * num_each
    values = {name: random(num_images, seed=index) for index, name in enumerate(["reward", *THRESHOLDS])}
    features, real = random(num_images, 5, seed=77).float(), gaussian_of(random(40, 5, seed=78))
    counts = draws_of_prompts(NUM_PROMPTS, 30, seed=0)
    found = summarize_draws(values, features, counts, {"frechet_3D": real})
    for draw, each in enumerate(counts):
        prompts = torch.arange(NUM_PROMPTS).repeat_interleave(each)
        rows = (prompts[:, None] * num_each + torch.arange(num_each)).flatten()
        numbers = {name: float(value[rows].mean()) for name, value in values.items()}
        numbers["damage"] = damage(numbers)
        by_prompt = features[rows].double().unflatten(0, (NUM_PROMPTS, num_each))
        numbers["diversity_prompts"] = float(diversity(by_prompt[:, 0]))
        if num_each > 1:
            numbers["diversity_seeds"] = float(diversity(by_prompt).mean())
        numbers["frechet_3D"] = float(frechet_distances(features[rows], torch.ones(1, num_images), *real))
        assert {name: float(column[draw]) for name, column in found.items()} == pytest.approx(numbers, rel=1e-9)


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(ValueError, match="needs two prompts or more"):
        summarize_draws({}, torch.zeros(3, 5), torch.ones(1, 1), {})
