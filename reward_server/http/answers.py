"""Make the JSON answers of /v1/score and /v1/rank: rewards, heat maps of the image gradient, orders, probabilities."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from services.contract import Float32, RewardResponse


class HeatMap(BaseModel):
    """∂ reward / ∂ pixel, summed up over the colors, at the picture's own size."""

    height_px: int
    width_px: int
    values: str = Field(
        description="L2 norm over the colors of ∂ reward / ∂ pixel: base64 of float32, little endian, row by row"
    )
    signed: str = Field(description="sum over the colors, above 0 where brighter is better; coded as `values`")


class Result(BaseModel):
    reward: float = Field(description="(1 + preference_scale) · positive_similarity − negative_similarity")
    positive_similarity: float
    negative_similarity: float
    heat_map: HeatMap | None = Field(default=None, description="if requested")


class ScoreAnswer(BaseModel):
    request_id: str
    scorer: str = Field(description="reward, checksum of its weights, crops", examples=["fluent-clip@sha256:…"])
    results: list[Result] = Field(description="in the order of the pictures")


class RankAnswer(BaseModel):
    request_id: str
    scorer: str = Field(description="reward, checksum of its weights, crops", examples=["fluent-clip@sha256:…"])
    order: list[int] = Field(description="the pictures' places in the request, best first", examples=[[1, 0]])
    rewards: list[float] = Field(description="in the order of the pictures")
    probabilities: list[list[float]] = Field(
        description="[i][j]: that picture i is preferred to j", examples=[[[0.5, 0.2], [0.8, 0.5]]]
    )
    temperature: float


def score_answer(response: RewardResponse) -> ScoreAnswer:
    """Return the answer of /v1/score for a response of one reward."""
    (scorer,), (positive,), (negative,) = (
        response.scorers, response.positive_similarities, response.negative_similarities
    )  # fmt: skip
    gradients = response.image_gradient
    results = [
        Result(
            reward=float(reward),
            positive_similarity=float(positive[index]),
            negative_similarity=float(negative[index]),
            heat_map=None if gradients is None else heat_map(gradients[index]),
        )
        for index, reward in enumerate(response.rewards)
    ]
    return ScoreAnswer(request_id=response.request_id, scorer=scorer, results=results)


def heat_map(image_gradient: Float32) -> HeatMap:
    """Return the heat map of one image's gradient (3, height_px, width_px)."""
    _, height, width = image_gradient.shape
    return HeatMap(
        height_px=height,
        width_px=width,
        values=_base64(np.linalg.norm(image_gradient, axis=0)),
        signed=_base64(image_gradient.sum(axis=0)),
    )


def rank_answer(response: RewardResponse, temperature: float) -> RankAnswer:
    """Return the answer of /v1/rank for a response of one reward; equal rewards keep the order of the request."""
    (scorer,) = response.scorers
    return RankAnswer(
        request_id=response.request_id,
        scorer=scorer,
        order=np.argsort(-response.rewards, kind="stable").tolist(),
        rewards=response.rewards.tolist(),
        probabilities=preference_probabilities(response.rewards, temperature).tolist(),
        temperature=temperature,
    )


def preference_probabilities(rewards: Float32, temperature: float) -> NDArray[np.float64]:
    """Return P(i preferred to j) = sigmoid((r_i − r_j) / temperature), (batch, batch): Bradley and Terry (1952)."""
    column = rewards.astype(np.float64)[:, None]
    with np.errstate(over="ignore"):  # tanh(±inf) is ±1
        return 0.5 * (1 + np.tanh((column - column.T) / temperature / 2))  # sigmoid, without overflow


def _base64(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
