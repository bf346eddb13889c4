"""All bodies in flight are bounded: a request beyond the bound gets 503, and room later."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.scoring.worker import Worker
from services.contract import REWARDS_PATH, PromptPair, RewardRequest, RewardResponse, WeightedReward

REQUEST = RewardRequest(
    images=np.zeros((1, 3, 32, 32), np.uint8),
    pairs=(PromptPair("cat", "3D", "Flat"),),
    preference_scales=(0.0,),
    rewards=(WeightedReward("tiny-clip"),),
    with_gradient=False,
)
BODY = REQUEST.to_bytes()
LIMITS = Limits(max_body_bytes=len(BODY), max_bytes_in_flight=len(BODY) * 3 // 2)


def test_a_body_beyond_the_budget_is_turned_away_until_there_is_room(worker: Worker) -> None:
    async def run() -> None:
        has_begun, may_end = asyncio.Event(), asyncio.Event()

        async def score(request: RewardRequest, request_id: str) -> RewardResponse:
            has_begun.set()
            await may_end.wait()
            zero = np.zeros(1, np.float32)
            return RewardResponse(zero, zero[None], zero[None], None, ("tiny-clip@sha256:0",), request_id)

        transport = httpx.ASGITransport(build_app(score, worker.infos, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            first = asyncio.create_task(http.post(REWARDS_PATH, content=BODY))
            await has_begun.wait()
            for _ in range(2):  # what was refused takes no room
                refused = await http.post(REWARDS_PATH, content=BODY)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert f"{len(BODY)} bytes of requests are in flight" in refused.json()["error"]
            may_end.set()
            assert (await first).status_code == 200
            assert (await http.post(REWARDS_PATH, content=b"nonsense")).status_code == 422
            assert (await http.post(REWARDS_PATH, content=BODY + b"x")).status_code == 413
            assert (await http.post(REWARDS_PATH, content=BODY)).status_code == 200

    asyncio.run(asyncio.wait_for(run(), timeout=30))


def test_a_budget_that_no_largest_body_fits_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_bytes_in_flight is 9, less than max_body_bytes, 10"):
        Limits(max_body_bytes=10, max_bytes_in_flight=9)
