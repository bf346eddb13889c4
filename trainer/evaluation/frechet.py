"""Compute Fréchet distances of features to those of real pictures, for all draws of a bootstrap at once.

|m_a − m_b|² + tr(C_a + C_b − 2 (C_a C_b)^½) of two Gaussians with means m and covariances C: Heusel et al. 2017 (arXiv
1706.08500), equation 6. With C_a = AᵀA and C_b = L Lᵀ, the trace of the square root is the sum of the singular values
of A L. L is the same for all draws, and A has a row for each image that a draw has: the square root of its share times
its centered features. Singular values are exact where eigenvalues of C_a C_b are not: the square root of a zero that
is rounded to 1e-16 is 1e-8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distances(features: Tensor, counts: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the distance of each draw to the real pictures, (num_draws,) float64.

    features: (num_images, d). counts: how often each draw has each image, (num_draws, num_images). mean (d,) and
    covariance (d, d) are those of the real pictures' features; a draw's covariance is the unbiased one too.
    """
    features, counts, mean, covariance = (each.double() for each in (features, counts, mean, covariance))
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    rotated = features @ (vectors * eigenvalues.clamp(min=0).sqrt())
    if len(rotated) < rotated.shape[1]:  # in coordinates of the images' own span there are fewer columns
        rotated = torch.linalg.qr(rotated.T, mode="r").R.T
    num_images = counts.sum(dim=1)
    centered = features - features.mean(dim=0)
    shifts = counts @ centered / num_images[:, None]
    traces = (counts @ centered.square().sum(dim=1) - num_images * shifts.square().sum(dim=1)) / (num_images - 1)
    roots = torch.stack([_trace_of_root(rotated, each) for each in counts])
    distances = (shifts + features.mean(dim=0) - mean).square().sum(dim=1) + traces + covariance.trace() - 2 * roots
    return distances.clamp(min=0)


def gaussian_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and unbiased covariance (d, d) of features (num_images, d), two or more, in float64."""
    return features.double().mean(dim=0), torch.cov(features.double().T)


def _trace_of_root(rotated: Tensor, counts: Tensor) -> Tensor:
    """Return tr (C_a C_b)^½ of one draw, with the features times L, (num_images, columns)."""
    drawn, times = rotated[counts > 0], counts[counts > 0][:, None]
    centered = drawn - (times * drawn).sum(dim=0) / times.sum()
    return torch.linalg.svdvals((times / (times.sum() - 1)).sqrt() * centered).sum()
