"""Combine the answers of several rewards to one request: Σ weight · reward, and the image gradient likewise.

response = await score_all(request, lambda reward: worker.score(Job(request, reward, request_id)))
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.contract import ContractError, Images, RewardRequest, RewardResponse


class NotFinite(ContractError):
    """A reward or gradient that is not finite; the text names the image."""

    reason = "not_finite"


async def score_all(request: RewardRequest, score_alone: Callable[[str], Awaitable[RewardResponse]]) -> RewardResponse:
    """Score all the request's rewards at once by `score_alone`; combine them. Raise what it and `combine` raise."""
    responses = await asyncio.gather(*(score_alone(reward.name) for reward in request.rewards))
    if request.with_gradient:  # megabytes: not on the event loop
        return await asyncio.to_thread(combine, request, responses)
    return combine(request, responses)


def combine(request: RewardRequest, responses: Sequence[RewardResponse]) -> RewardResponse:
    """Return the answer to `request` from `responses`, one of each of its rewards, in order, with float32 gradients.

    Raise NotFinite naming an image whose sum is not finite, or whose gradient does not fit gradient_dtype.
    """
    weights = [reward.weight for reward in request.rewards]
    with np.errstate(over="ignore", invalid="ignore"):  # found, and named, below
        rewards = _weighted_sum(weights, [response.rewards for response in responses])
        gradients = [response.image_gradient for response in responses if response.image_gradient is not None]
        image_gradient = _combined_gradient(weights, gradients, request.gradient_dtype) if gradients else None
    _check_finite("reward", rewards)
    if image_gradient is not None and not _is_as_scored(weights, request.gradient_dtype):
        _check_finite(f"image_gradient in {request.gradient_dtype}", image_gradient)
    return RewardResponse(
        rewards=rewards,
        positive_similarities=np.concatenate([response.positive_similarities for response in responses]),
        negative_similarities=np.concatenate([response.negative_similarities for response in responses]),
        image_gradient=image_gradient,
        scorers=tuple(scorer for response in responses for scorer in response.scorers),
        request_id=responses[0].request_id,
    )


def _combined_gradient(weights: Sequence[float], gradients: Sequence[Images], dtype: str) -> Images:
    stacked = [gradient for gradient in gradients if isinstance(gradient, np.ndarray)]
    if stacked:
        return _weighted_sum(weights, stacked).astype(dtype, copy=False)
    return tuple(
        _weighted_sum(weights, list(of_one_image)).astype(dtype, copy=False)
        for of_one_image in zip(*gradients, strict=True)
    )


def _weighted_sum(weights: Sequence[float], arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return Σ weight · array in float32; the array itself if there is nothing to do, since gradients are large."""
    if _is_as_scored(weights, "float32"):
        return arrays[0]
    total = np.float32(weights[0]) * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total += np.float32(weight) * array
    return total


def _is_as_scored(weights: Sequence[float], dtype: str) -> bool:
    return list(weights) == [1.0] and dtype == "float32"


def _check_finite(what: str, values: Images) -> None:
    for index, of_one_image in enumerate(values):
        if not np.isfinite(of_one_image).all():
            raise NotFinite(f"images[{index}] has no finite {what}")
