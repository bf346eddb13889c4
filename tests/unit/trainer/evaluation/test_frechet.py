"""Fréchet distances agree with closed forms, and those of a draw with the definition on the rows that it has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.evaluation.bootstrap import draws_of_prompts
from trainer.evaluation.frechet import frechet_distances, gaussian_of


def definition(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), by the symmetric C_a^½ C_b C_a^½."""
    eigenvalues, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def features(num_images: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, size, generator=generator, dtype=torch.float64) + seed


@pytest.mark.parametrize(("num_images", "size", "tolerance"), [(60, 6, 1e-9), (20, 30, 1e-6)])
def test_a_draw_has_the_distance_of_the_rows_that_it_counts(num_images: int, size: int, tolerance: float) -> None:
    """With fewer images than dimensions the definition itself loses digits: it takes the root of rounded zeros."""
    drawn, real = features(num_images, size, seed=1), gaussian_of(features(100, size, seed=2))
    counts = draws_of_prompts(num_images, 50, seed=0)
    found = frechet_distances(drawn, counts, *real)
    for each, distance in zip(counts, found.tolist(), strict=True):
        rows = drawn.repeat_interleave(each, dim=0)
        assert distance == pytest.approx(definition(*gaussian_of(rows), *real), rel=tolerance)


def test_commuting_gaussians_have_a_closed_form_even_if_one_is_flat() -> None:
    """The eight corners of a box, with mean 0 and the squares of its sides as variances."""
    sides, others = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.0, 0.5]).double()
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    mean = torch.tensor([1.0, 1.0, 0.0])
    unbiased = sides * (8 / 7) ** 0.5
    (found,) = frechet_distances(corners * sides, torch.ones(1, 8), mean, others.square().diag())
    assert float(found) == pytest.approx(float(mean.square().sum() + (unbiased - others).square().sum()), rel=1e-12)


@pytest.mark.parametrize("size", [4, 40])
def test_the_distance_to_the_same_pictures_is_zero(size: int) -> None:
    same = features(10, size, seed=3)
    (found,) = frechet_distances(same, torch.ones(1, 10), *gaussian_of(same))
    assert float(found) == pytest.approx(0, abs=1e-6)
