"""The remote reward as a differentiable torch function: `reward = remote_reward(images, pairs, client=…, reward=…)`.

The service answers r and ∂r/∂images. Backward multiplies ∂r/∂images by the incoming gradient, so that the result is
that of autograd through the reward model, which runs elsewhere. A second derivative does not exist and is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from services.clients.reward import RewardClient
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward


def remote_reward(
    images: Tensor,
    pairs: Sequence[PromptPair],
    *,
    client: RewardClient,
    reward: str | tuple[WeightedReward, ...],
    preference_scale: float = 0.0,
) -> Tensor:
    """Return the rewards (batch,), float32 and differentiable, of images (batch, 3, height_px, width_px) in [0, 1].

    The rewards are on the images' device. `reward`: a name that the service lists, or several with weights. The
    gradient is requested only if the images need one. Raise RewardError, and ContractError for images outside [0, 1].
    """
    request = RewardRequest(
        images=images.detach().float().cpu().numpy(),
        pairs=tuple(pairs),
        preference_scales=(preference_scale,) * len(pairs),
        rewards=(WeightedReward(reward),) if isinstance(reward, str) else reward,
        with_gradient=need_gradient(images),
    )
    return rewards_of(images, client.score(request))


def need_gradient(images: Tensor) -> bool:
    """Return whether autograd will need the gradient with respect to these images."""
    return images.requires_grad and torch.is_grad_enabled()


def rewards_of(images: Tensor, response: RewardResponse) -> Tensor:
    """Return the answer's rewards (batch,), differentiable if the images are.

    Raise ValueError if a reward is not finite, and as attach_gradient does.
    """
    if need_gradient(images):
        return attach_gradient(images, response)
    rewards = _tensor(response.rewards, images)
    if not torch.isfinite(rewards).all():
        raise ValueError(f"reward {response.scorers} answered non-finite numbers (request {response.request_id})")
    return rewards


def attach_gradient(images: Tensor, response: RewardResponse) -> Tensor:
    """Return the answer's rewards (batch,) as a function of the images (batch, 3, height_px, width_px) that were sent.

    Raise ValueError if the gradient is missing, does not fit or is not finite: it would train noise.
    """
    if not isinstance(response.image_gradient, np.ndarray):
        raise ValueError(f"reward {response.scorers} answered no stacked image_gradient: ask with with_gradient=True")
    rewards, gradient = _tensor(response.rewards, images), _tensor(response.image_gradient, images)
    if gradient.shape != images.shape or rewards.shape != images.shape[:1]:
        shapes = f"{tuple(rewards.shape)} and {tuple(gradient.shape)}"
        raise ValueError(f"reward {response.scorers} answered shapes {shapes} to images {tuple(images.shape)}")
    if not (torch.isfinite(rewards).all() and torch.isfinite(gradient).all()):
        raise ValueError(f"reward {response.scorers} answered non-finite numbers (request {response.request_id})")
    return _Reward.apply(images, rewards, gradient)


class _Reward(torch.autograd.Function):
    """(images, rewards, ∂rewards/∂images) -> rewards; each image's reward depends on that image alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rewards: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return rewards.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.view(-1, 1, 1, 1) * gradient, None, None


def _tensor(numbers: Any, images: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=images.device)
