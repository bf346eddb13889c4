"""What takes long lets the other callers have their turn: it leaves the event loop, or pauses."""

from __future__ import annotations

import asyncio
import sys
from types import FrameType

import httpx
import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse

from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.http.requests import ScoreRequest, read_fields
from reward_server.scoring.worker import Worker
from services.contract import SCORE_PATH, RewardRequest, RewardResponse
from tests.contract.http.test_people_api import FILES, TEXTS, WORDS

LONG_PROMPT = "a cat " * 150_000
PIECE_BYTES = 64 << 10


def test_a_heat_map_is_not_written_on_the_event_loop(worker: Worker) -> None:
    rendered_here: list[FrameType] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:  # of this thread only
        if event == "call" and frame.f_code is JSONResponse.render.__code__:
            rendered_here.append(frame)

    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        zero = np.zeros(1, np.float32)
        gradient = (np.zeros(request.images[0].shape, np.float32),)
        return RewardResponse(zero, zero[None], zero[None], gradient, ("tiny-clip@sha256:0",), request_id)

    async def run() -> None:
        transport = httpx.ASGITransport(build_app(score, worker.infos, Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            fields = WORDS | {"images": TEXTS[:1], "with_heat_map": True}
            sys.setprofile(watch)
            try:
                answer = await http.post(SCORE_PATH, json=fields)
                assert "heat_map" in answer.json()["results"][0]
                assert not rendered_here
                await http.post(SCORE_PATH, json={})
                assert rendered_here  # an error's answer is small: the watch does see what runs here
            finally:
                sys.setprofile(None)

    asyncio.run(run())


def test_a_form_is_parsed_piece_by_piece() -> None:
    texts = WORDS | {"prompt": LONG_PROMPT}
    form = httpx.Request("POST", "http://service", data=texts, files=[("image", ("a.png", FILES[0]))])
    body = form.read()
    scope = {"type": "http", "headers": [(b"content-type", form.headers["content-type"].encode())]}

    async def run() -> None:
        num_turns = 0

        async def count_turns() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(count_turns())
        fields = await read_fields(Request(scope), body, ScoreRequest, Limits())
        others.cancel()
        assert (fields.prompt, fields.images) == (LONG_PROMPT, FILES[:1])
        assert num_turns >= len(body) // PIECE_BYTES

    asyncio.run(run())
