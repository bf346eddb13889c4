"""The client of the reward service, sync and async: keeps connections, bounds waits and names what went wrong.

    with RewardClient("http://127.0.0.1:8000") as client:
        client.wait_until_ready(timeout_s=60)
        response = client.score(request)

    async with AsyncRewardClient("http://127.0.0.1:8000") as client:
        responses = await asyncio.gather(*map(client.score, requests))

This file does the I/O. reward_exchange.py decides what is sent, sent again or raised; it explains the keyword arguments
(RewardApi) and shows the tree of errors. The API key is that of the environment variable SRPO_API_KEY unless given.
"""

from __future__ import annotations

import asyncio
import os
import time
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import httpx

from services.clients.reward_exchange import (
    Answer,
    Call,
    Exchange,
    NoAnswer,
    Result,
    RewardApi,
    RewardBusy,
    RewardError,
    RewardRejected,
    RewardUnauthorized,
    RewardUnavailable,
    RewardUnreachable,
)
from services.contract import RewardRequest, RewardResponse

__all__ = [
    "AsyncRewardClient",
    "RewardBusy",
    "RewardClient",
    "RewardError",
    "RewardRejected",
    "RewardUnauthorized",
    "RewardUnavailable",
    "RewardUnreachable",
]

API_KEY_VARIABLE = "SRPO_API_KEY"
_MAX_CONNECTIONS = 64  # more callers wait for a connection


class Patience(TypedDict, total=False):
    """The optional fields of RewardApi, which explains them."""

    timeout_s: float
    max_attempts: int
    backoff_s: float
    patience_s: float


class RewardClient:
    """Connections to one reward service, for any number of threads. Close it, or use it in a `with` block."""

    def __init__(self, url: str, *, api_key: str | None = None, **patience: Unpack[Patience]) -> None:
        self.url = url.rstrip("/")
        self._api = RewardApi(self.url, **patience)
        self._http = httpx.Client(**_http_options(self.url, api_key))

    def score(self, request: RewardRequest) -> RewardResponse:
        """Return rewards and, if requested, image gradients, in the order of the images. Raise RewardError."""
        return self._run(self._api.score(request))

    def models(self) -> dict[str, str | None]:
        """Return the rewards that are served: name -> checksum of the weights, None until they are loaded.

        Raise RewardError.
        """
        return self._run(self._api.models())

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the service has loaded its weights. Raise RewardUnreachable after timeout_s."""
        self._run(self._api.ready(timeout_s))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, exchange: Exchange[Result]) -> Result:
        call = next(exchange)
        while True:
            time.sleep(call.after_s)
            try:
                outcome = _answer(self._http.request(**_arguments(call)))
            except httpx.RequestError as error:
                outcome = _no_answer(error)
            try:
                call = exchange.send(outcome)
            except StopIteration as end:
                return end.value


class AsyncRewardClient:
    """RewardClient for asyncio: any number of requests at once on one event loop."""

    def __init__(self, url: str, *, api_key: str | None = None, **patience: Unpack[Patience]) -> None:
        self.url = url.rstrip("/")
        self._api = RewardApi(self.url, **patience)
        self._http = httpx.AsyncClient(**_http_options(self.url, api_key))

    async def score(self, request: RewardRequest) -> RewardResponse:
        """Return rewards and, if requested, image gradients, in the order of the images. Raise RewardError."""
        return await self._run(self._api.score(request))

    async def models(self) -> dict[str, str | None]:
        """Return the rewards that are served: name -> checksum of the weights, None until they are loaded.

        Raise RewardError.
        """
        return await self._run(self._api.models())

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the service has loaded its weights. Raise RewardUnreachable after timeout_s."""
        await self._run(self._api.ready(timeout_s))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, exchange: Exchange[Result]) -> Result:
        call = next(exchange)
        while True:
            await asyncio.sleep(call.after_s)
            try:
                outcome = _answer(await self._http.request(**_arguments(call)))
            except httpx.RequestError as error:
                outcome = _no_answer(error)
            try:
                call = exchange.send(outcome)
            except StopIteration as end:
                return end.value


def _http_options(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the arguments of both httpx clients.

    Raise RewardUnreachable for a URL, and RewardUnauthorized for a key, that cannot be used.
    """
    try:
        is_address = httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise RewardUnreachable(f"{url!r} is no address of a reward service: give one such as http://127.0.0.1:8000")
    key = (api_key or os.environ.get(API_KEY_VARIABLE, "")).strip()  # a key from a file may end in a line break
    if not (key.isascii() and key.isprintable()):  # the library's own error would show the key
        raise RewardUnauthorized(f"{API_KEY_VARIABLE} holds characters that no HTTP header can carry")
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "limits": httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS),
    }


def _arguments(call: Call) -> dict[str, Any]:
    # Waiting for one of our own connections is no failure of the service; callers that hold one are bounded in time.
    timeout = httpx.Timeout(call.timeout_s, pool=None)
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body,
        "headers": dict(call.headers),
        "timeout": timeout,
    }


def _answer(answer: httpx.Response) -> Answer | NoAnswer:
    return Answer(answer.status_code, answer.headers, answer.content)


def _no_answer(error: httpx.RequestError) -> Answer | NoAnswer:
    return NoAnswer(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
