"""A reward in this process that answers as the service does and records its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.contract import Float32, PromptPair, RewardResponse

Similarity = Callable[[Tensor, str], Tensor]  # images (batch, 3, height, width), a text -> (batch,)


def similarity(images: Tensor, text: str) -> Tensor:
    """Return a smooth similarity (batch,), different for each image and text."""
    phase = sum(map(ord, text)) % 7
    return 0.5 * images.mean(dim=(1, 2, 3)) + 0.1 * (images * 3 + phase).sin().std(dim=(1, 2, 3)) + 0.05 * phase


@dataclass
class LocalReward:
    """Return (1 + k)·similarity(positive) − similarity(negative), or (1 + k)·R(image) if reads_text is False."""

    reads_text: bool = True
    similarity: Similarity = similarity
    requests: list[tuple[str, tuple[PromptPair, ...], tuple[float, ...]]] = field(default_factory=list)

    def __call__(
        self, name: str, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...], with_gradient: bool
    ) -> RewardResponse:
        self.requests.append((name, pairs, scales))
        leaf = torch.tensor(images, requires_grad=True)
        positive = self._each(leaf, [pair.positive_text for pair in pairs])
        negative = self._each(leaf, [pair.negative_text for pair in pairs]) * self.reads_text
        rewards = (1 + torch.tensor(scales)) * positive - negative
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
        values = [value.detach().numpy() for value in (rewards, positive, negative)]
        given = gradient.numpy() if with_gradient else None
        return RewardResponse(values[0], values[1][None], values[2][None], given, (name,), "0")

    def _each(self, images: Tensor, texts: list[str]) -> Tensor:
        names = texts if self.reads_text else [""] * len(texts)
        return torch.cat([self.similarity(image[None], text) for image, text in zip(images, names, strict=True)])
