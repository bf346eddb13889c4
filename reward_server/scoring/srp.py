"""Compute the relative reward of an image under a prompt pair, and its gradient, from similarities.

SRPO scores one image under two texts (arXiv 2509.06942, section 3.3; guidance form): r = (1 + k)·pos − neg. A model
that embeds image and text apart needs one image forward for both similarities, and one backward for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# images (batch, 3, height, width) in [0, 1] -> positive and negative similarities (batch,), each image's its own
Similarities = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class PairReward:
    """Rewards and both similarities (batch,)."""

    rewards: Tensor
    positive_similarities: Tensor
    negative_similarities: Tensor


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Return each image's similarity to its own text, (batch,), from (batch, embedding) twice: their dot product."""
    return (image_embeds * text_embeds).sum(dim=-1)


def relative_reward(positive: Tensor, negative: Tensor, preference_scale: Tensor) -> PairReward:
    """Return (1 + k)·pos − neg for each image; similarities and preference_scale k are (batch,)."""
    return PairReward((1 + preference_scale) * positive - negative, positive, negative)


def value(similarities: Similarities, images: Tensor, preference_scale: Tensor) -> PairReward:
    """Return the rewards alone: one forward, no gradient."""
    with torch.inference_mode():
        return relative_reward(*similarities(images), preference_scale)


def value_for_gradient(
    similarities: Similarities, images: Tensor, preference_scale: Tensor, gradient_scale: float = 1.0
) -> tuple[PairReward, Callable[[], Tensor]]:
    """Return the rewards, and a function that computes ∂ reward / ∂ image (batch, 3, height, width) in one backward.

    similarities must treat the images of a batch independently: then the gradient of the sum is each image's own.
    gradient_scale: a power of two by which all gradients on the way are larger, where float16 would lose the smallest.
    """
    with torch.enable_grad():
        leaves = images.detach().requires_grad_()
        outcome = relative_reward(*similarities(leaves), preference_scale)
        total = outcome.rewards.sum() * gradient_scale

    def image_gradient() -> Tensor:
        gradient = torch.autograd.grad(total, leaves)[0]
        return gradient if gradient_scale == 1 else gradient.div_(gradient_scale)

    return PairReward(
        outcome.rewards.detach(), outcome.positive_similarities.detach(), outcome.negative_similarities.detach()
    ), image_gradient
