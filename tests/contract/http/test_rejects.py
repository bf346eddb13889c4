"""What was wrong with a request is counted and logged by its kind: whatever the caller wrote, the kinds are few."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import httpx
import numpy as np

from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.metrics import REJECTS, Metric
from reward_server.models.protocol import TextTooLong
from reward_server.scoring.batching import Overloaded
from reward_server.scoring.combine import NotFinite
from reward_server.scoring.worker import Worker
from services.contract import (
    MODELS_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    PromptPair,
    RewardRequest,
    RewardResponse,
    WeightedReward,
)
from tests.serving import serve_app

FAILURES = {"many": Overloaded("full"), "long": TextTooLong("48 tokens"), "broken": NotFinite("images[0]")}  # by prompt
MAX_BODY_BYTES = 1 << 12
FIELDS = {"images": ["R0lG"], "prompt": "cat", "positive": "3D", "negative": "Flat"}


def message(num_images: int = 1, prompt: str = "cat", reward: str = "tiny-clip") -> bytes:
    images = np.zeros((num_images, 3, 8, 8), np.uint8)
    pairs = (PromptPair(prompt, "3D", "Flat"),) * num_images
    return RewardRequest(images, pairs, (0.0,) * num_images, (WeightedReward(reward),)).to_bytes()


def test_each_kind_of_mistake_has_its_word(worker: Worker, log: io.StringIO) -> None:
    counted: list[str] = []

    def record(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric is REJECTS:
            counted.append(labels["reason"])

    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        raise FAILURES.get(request.pairs[0].prompt, RuntimeError(request_id))

    bodies = [*(message(prompt=prompt) for prompt in FAILURES), message(3), message(reward="beauty")]
    bodies += [b"nonsense", bytes(MAX_BODY_BYTES + 1), message()]
    limits = Limits(max_images=2, max_body_bytes=MAX_BODY_BYTES, requests_per_s=1e-3, request_burst=len(bodies) + 2)
    with serve_app(build_app(score, worker.infos, limits, record=record)) as url:  # a connection each: errors close it
        for body in bodies:
            httpx.post(url + REWARDS_PATH, content=body)
        httpx.post(url + SCORE_PATH, json=FIELDS)
        httpx.get(url + REWARDS_PATH)
        httpx.get(url + MODELS_PATH)
        httpx.get(url + MODELS_PATH, headers={"x-request-id": "two words"})
        httpx.get(url + "/healthz")
    assert counted == [
        *("overloaded", "text_too_long", "not_finite", "max_images", "unknown_reward", "message", "max_body_bytes"),
        *("internal_server_error", "picture", "method_not_allowed", "too_many_requests", "request_id"),
    ]
    requests = [line for line in map(json.loads, log.getvalue().splitlines()) if line["message"] == "request"]
    logged = [line.get("reject_reason") for line in requests]
    assert [each for each in logged if each] == [each for each in counted if each != "internal_server_error"]
    assert logged[-1] is None  # of /healthz
