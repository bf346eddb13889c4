"""Requests to a reward service that runs in processes of its own: make, send, hold back, wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from services.clients.reward import RewardClient
from services.contract import MEDIA_TYPE, REWARDS_PATH, PromptPair, RewardRequest, RewardResponse, WeightedReward

NUM_CALLERS = 8
BESIDE = "beside-clip"
KEY = "key-of-these-tests"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


def make_request(seed: int, batch: int, size_px: int = 32, rewards: dict[str, float] | None = None) -> RewardRequest:
    images = np.random.default_rng(seed).integers(0, 256, (batch, 3, size_px, size_px), dtype=np.uint8)
    pairs = tuple(PromptPair(f"subject {seed} {index}", "3D", "Flat") for index in range(batch))
    weighted = tuple(WeightedReward(name, weight) for name, weight in (rewards or {BESIDE: 1.0}).items())
    return RewardRequest(images, pairs, (0.1,) * batch, weighted)


def score_all(client: RewardClient, requests: list[RewardRequest]) -> list[RewardResponse]:
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        return list(callers.map(client.score, requests))


def post(url: str, request: RewardRequest) -> httpx.Response:
    """Send the request once, without a second attempt."""
    headers = {"content-type": MEDIA_TYPE, **AUTHORIZED}
    return httpx.post(url + REWARDS_PATH, content=request.to_bytes(), headers=headers, timeout=120)


@contextmanager
def under_way(url: str, request: RewardRequest) -> Iterator[Future[httpx.Response]]:
    """Send a request's last byte at the end of the block, and all others at its start; give its answer."""
    body = request.to_bytes()
    has_begun, may_end = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield body[:-1]
        has_begun.set()
        assert may_end.wait(timeout=60)
        yield body[-1:]

    headers = {"content-type": MEDIA_TYPE, **AUTHORIZED}
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(httpx.post, url + REWARDS_PATH, content=slowly(), headers=headers, timeout=120)
        try:
            assert has_begun.wait(timeout=60)
            yield answer
        finally:
            may_end.set()


def wait_until(is_so: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """Call `is_so`, which waits for the network itself, until it returns something true; return that."""
    deadline = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
    return found
