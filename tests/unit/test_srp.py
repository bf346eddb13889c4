"""The relative reward is (1 + k)·pos − neg, and its gradient is the derivative of exactly that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reward_server.srp import relative_reward, value, value_and_image_gradient

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


def test_equals_the_formula_on_cosines() -> None:
    image = random_embeds(4)
    cosine = torch.nn.functional.cosine_similarity
    positive, negative = cosine(image, POSITIVE), cosine(image, NEGATIVE)
    outcome = relative_reward(image, POSITIVE, NEGATIVE, SCALES)
    torch.testing.assert_close(outcome.rewards, (1 + SCALES) * positive - negative)
    torch.testing.assert_close(outcome.positive_similarities, positive)
    torch.testing.assert_close(outcome.negative_similarities, negative)


def test_swapping_the_pair_negates_the_reward_at_preference_scale_zero(images: Tensor) -> None:
    zero = torch.zeros(BATCH, dtype=torch.float64)
    there = value_and_image_gradient(embed_image, images, POSITIVE, NEGATIVE, zero)
    back = value_and_image_gradient(embed_image, images, NEGATIVE, POSITIVE, zero)
    torch.testing.assert_close(there.rewards, -back.rewards)
    assert there.image_gradient is not None
    assert back.image_gradient is not None
    torch.testing.assert_close(there.image_gradient, -back.image_gradient)


def test_a_mean_of_unit_embeddings_is_rewarded_with_the_mean_reward() -> None:
    views = [random_embeds(4), random_embeds(5)]
    mean = relative_reward(torch.stack(views).mean(dim=0), POSITIVE, NEGATIVE, SCALES)
    each = [relative_reward(view, POSITIVE, NEGATIVE, SCALES).rewards for view in views]
    torch.testing.assert_close(mean.rewards, torch.stack(each).mean(dim=0))


def test_reward_passes_gradcheck(images: Tensor) -> None:
    def rewards(images: Tensor) -> Tensor:
        return relative_reward(embed_image(images), POSITIVE, NEGATIVE, SCALES).rewards

    assert torch.autograd.gradcheck(rewards, images.requires_grad_())


def test_image_gradient_is_each_images_own_finite_difference(images: Tensor) -> None:
    outcome = value_and_image_gradient(embed_image, images, POSITIVE, NEGATIVE, SCALES)
    assert outcome.image_gradient is not None
    direction = torch.randn_like(images)
    step = 1e-6
    ahead = value(embed_image, images + step * direction, POSITIVE, NEGATIVE, SCALES)
    behind = value(embed_image, images - step * direction, POSITIVE, NEGATIVE, SCALES)
    slope = (ahead.rewards - behind.rewards) / (2 * step)
    torch.testing.assert_close((outcome.image_gradient * direction).sum(dim=(1, 2, 3)), slope, rtol=1e-6, atol=1e-8)


def test_values_are_the_same_with_and_without_the_gradient(images: Tensor) -> None:
    with_gradient = value_and_image_gradient(embed_image, images, POSITIVE, NEGATIVE, SCALES)
    without = value(embed_image, images, POSITIVE, NEGATIVE, SCALES)
    torch.testing.assert_close(with_gradient.rewards, without.rewards, rtol=0, atol=0)
    assert without.image_gradient is None


def test_the_gradient_is_there_even_under_no_grad(images: Tensor) -> None:
    with torch.no_grad():
        outcome = value_and_image_gradient(embed_image, images, POSITIVE, NEGATIVE, SCALES)
    assert outcome.image_gradient is not None
    assert outcome.image_gradient.abs().sum() > 0
