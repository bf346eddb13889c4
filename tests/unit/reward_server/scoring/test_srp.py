"""The relative reward is (1 + k)·pos − neg, and its gradient is the derivative of exactly that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reward_server.scoring.srp import PairReward, Similarities, relative_reward, similarity, value, value_for_gradient

BATCH, EMBEDDING = 3, 5


def random_embeds(seed: int) -> Tensor:
    embeds = torch.randn(BATCH, EMBEDDING, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(embeds, dim=-1)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(BATCH, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def embed_image(images: Tensor) -> Tensor:
    """Nonlinear, and each image apart."""
    weights = torch.randn(72, EMBEDDING, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tanh(images.flatten(1) @ weights)


SCALES = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
POSITIVE, NEGATIVE = random_embeds(2), random_embeds(3)


def similarities_to(positive: Tensor, negative: Tensor) -> Similarities:
    def similarities(images: Tensor) -> tuple[Tensor, Tensor]:
        embeds = torch.nn.functional.normalize(embed_image(images), dim=-1)
        return similarity(embeds, positive), similarity(embeds, negative)

    return similarities


def with_gradient(similarities: Similarities, images: Tensor, scales: Tensor) -> tuple[PairReward, Tensor]:
    outcome, image_gradient = value_for_gradient(similarities, images, scales)
    return outcome, image_gradient()


def test_equals_the_formula() -> None:
    positive, negative = torch.rand(BATCH, dtype=torch.float64), torch.rand(BATCH, dtype=torch.float64)
    outcome = relative_reward(positive, negative, SCALES)
    torch.testing.assert_close(outcome.rewards, (1 + SCALES) * positive - negative)


def test_similarity_of_embeddings_of_length_one_is_their_cosine() -> None:
    image, text = random_embeds(4), POSITIVE
    normalize = torch.nn.functional.normalize
    cosine = torch.nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(similarity(normalize(image, dim=-1), normalize(text, dim=-1)), cosine)


def test_swapping_the_pair_negates_the_reward_at_preference_scale_zero(images: Tensor) -> None:
    zero = torch.zeros(BATCH, dtype=torch.float64)
    there, gradient_there = with_gradient(similarities_to(POSITIVE, NEGATIVE), images, zero)
    back, gradient_back = with_gradient(similarities_to(NEGATIVE, POSITIVE), images, zero)
    torch.testing.assert_close(there.rewards, -back.rewards)
    torch.testing.assert_close(gradient_there, -gradient_back)


def test_reward_passes_gradcheck(images: Tensor) -> None:
    similarities = similarities_to(POSITIVE, NEGATIVE)

    def rewards(images: Tensor) -> Tensor:
        return relative_reward(*similarities(images), SCALES).rewards

    assert torch.autograd.gradcheck(rewards, images.requires_grad_())


def test_image_gradient_is_each_images_own_finite_difference(images: Tensor) -> None:
    similarities = similarities_to(POSITIVE, NEGATIVE)
    _, image_gradient = with_gradient(similarities, images, SCALES)
    direction = torch.randn_like(images)
    step = 1e-6
    ahead = value(similarities, images + step * direction, SCALES)
    behind = value(similarities, images - step * direction, SCALES)
    slope = (ahead.rewards - behind.rewards) / (2 * step)
    torch.testing.assert_close((image_gradient * direction).sum(dim=(1, 2, 3)), slope, rtol=1e-6, atol=1e-8)


def test_values_are_the_same_with_and_without_the_gradient(images: Tensor) -> None:
    similarities = similarities_to(POSITIVE, NEGATIVE)
    outcome, _ = with_gradient(similarities, images, SCALES)
    torch.testing.assert_close(outcome.rewards, value(similarities, images, SCALES).rewards, rtol=0, atol=0)


def test_a_pair_costs_one_image_forward(images: Tensor) -> None:
    num_forwards = 0

    def counting(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal num_forwards
        num_forwards += 1
        return similarities_to(POSITIVE, NEGATIVE)(images)

    with_gradient(counting, images, SCALES)
    assert num_forwards == 1


def test_the_gradient_is_there_even_under_no_grad(images: Tensor) -> None:
    with torch.no_grad():
        _, image_gradient = with_gradient(similarities_to(POSITIVE, NEGATIVE), images, SCALES)
    assert image_gradient.abs().sum() > 0


def test_a_scale_brings_gradients_through_a_dtype_that_loses_them() -> None:
    tiny = 2.0**-28  # float16 ends at 2^-24

    def through_float16(images: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.to(torch.float16).flatten(1).to(torch.float32).sum(dim=1) * tiny
        return rows, torch.zeros_like(rows)

    ones, scales = torch.ones(2, 3, 4, 4), torch.zeros(2)
    _, lost = value_for_gradient(through_float16, ones, scales)
    outcome, kept = value_for_gradient(through_float16, ones, scales, gradient_scale=1024)
    assert lost().count_nonzero() == 0
    assert kept().equal(torch.full_like(ones, tiny))
    assert outcome.rewards.equal(torch.full((2,), 48 * tiny))  # themselves not scaled
