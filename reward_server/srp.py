"""The relative reward of an image under a prompt pair, and its gradient: arithmetic on embeddings, nothing else.

SRPO scores one image under two texts (arXiv 2509.06942, section 3.3; guidance form): r = (1 + k)·pos − neg, pos and
neg being cosine similarities. r is linear in the texts, so a pair costs one image forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EmbedImage = Callable[[Tensor], Tensor]  # images (batch, 3, height, width) in [0, 1] -> (batch, embedding)


@dataclass(frozen=True, slots=True, eq=False)
class PairReward:
    """Rewards and both similarities (batch,); image_gradient ∂ reward / ∂ image, shaped as the images, if computed."""

    rewards: Tensor
    positive_similarities: Tensor
    negative_similarities: Tensor
    image_gradient: Tensor | None = None


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Dot product of each image with its own text, (batch, embedding) twice -> (batch,): their cosine where both have
    length one; the mean of cosines where the image is a mean of unit embeddings (models/views.py)."""
    return (image_embeds * text_embeds).sum(dim=-1)


def relative_reward(
    image_embeds: Tensor, positive_embeds: Tensor, negative_embeds: Tensor, preference_scale: Tensor
) -> PairReward:
    """(1 + k)·pos − neg for each image; embeddings (batch, embedding), preference_scale k (batch,)."""
    positive = similarity(image_embeds, positive_embeds)
    negative = similarity(image_embeds, negative_embeds)
    return PairReward((1 + preference_scale) * positive - negative, positive, negative)


def value(
    embed_image: EmbedImage, images: Tensor, positive_embeds: Tensor, negative_embeds: Tensor, preference_scale: Tensor
) -> PairReward:
    """The rewards alone: one image forward."""
    with torch.no_grad():
        return relative_reward(embed_image(images), positive_embeds, negative_embeds, preference_scale)


def value_and_image_gradient(
    embed_image: EmbedImage, images: Tensor, positive_embeds: Tensor, negative_embeds: Tensor, preference_scale: Tensor
) -> PairReward:
    """The rewards and ∂ reward / ∂ image of every image: one forward and one backward for the whole batch.

    embed_image must treat the images of a batch independently: then the gradient of the sum is each image's own.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        outcome = relative_reward(embed_image(images), positive_embeds, negative_embeds, preference_scale)
        (image_gradient,) = torch.autograd.grad(outcome.rewards.sum(), images)
    return PairReward(
        outcome.rewards.detach(),
        outcome.positive_similarities.detach(),
        outcome.negative_similarities.detach(),
        image_gradient,
    )
