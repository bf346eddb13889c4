"""Both clients against the real app and a failing network: nothing is lost, and every wait is bounded."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.http.app import build_app
from reward_server.scoring.reward_info import RewardInfo
from reward_server.scoring.worker import Worker
from services.clients.reward import (
    AsyncRewardClient,
    RewardBusy,
    RewardClient,
    RewardRejected,
    RewardUnauthorized,
    RewardUnavailable,
    RewardUnreachable,
)
from services.clients.reward_exchange import Answer, Call, NoAnswer, RewardApi
from services.config.rewards import RewardServiceConfig
from services.contract import IDEMPOTENCY_KEY_HEADER, RewardRequest, RewardResponse, WeightedReward
from tests.contract.conftest import LIMITS, REQUEST
from tests.serving import reward_app, serve_app

MIXED = replace(
    REQUEST,
    images=(
        np.random.default_rng(1).random((3, 40, 30), dtype=np.float32),
        np.random.default_rng(2).integers(0, 256, (3, 20, 50), dtype=np.uint8),
    ),
)
SECRET = "key-that-nobody-may-see"


@dataclass
class FailsFirst:
    """An ASGI app that answers its first requests with `failures`, and later ones with the app that it wraps."""

    app: ASGIApp
    failures: list[ASGIApp]
    idempotency_keys: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.idempotency_keys.append(Headers(scope=scope).get(IDEMPOTENCY_KEY_HEADER, ""))
        answer = self.failures.pop(0) if self.failures else self.app
        await answer(scope, receive, send)


def status(code: int, **headers: str) -> ASGIApp:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response("replica died", status_code=code, headers=named)


async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
    """Promise more bytes than are sent, so that uvicorn closes the connection in the middle of the answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": b"half"})


def answer_lost(app: ASGIApp) -> ASGIApp:
    """Let the app do the work and answer 502, like a proxy whose connection breaks."""

    async def lose(scope: Scope, receive: Receive, send: Send) -> None:
        async def drop(message: Message) -> None:
            del message

        await app(scope, receive, drop)
        await status(502)(scope, receive, send)

    return lose


def score_sync(url: str, requests: Sequence[RewardRequest], **options: Any) -> list[RewardResponse]:
    with RewardClient(url, **options) as client:
        return [client.score(request) for request in requests]


def score_async(url: str, requests: Sequence[RewardRequest], **options: Any) -> list[RewardResponse]:
    async def score() -> list[RewardResponse]:
        async with AsyncRewardClient(url, **options) as client:
            return await asyncio.gather(*map(client.score, requests))

    return asyncio.run(score())


Score = Callable[..., list[RewardResponse]]
both_clients = pytest.mark.parametrize("score", [score_sync, score_async])


def test_both_clients_get_the_same_numbers(reward_url: str) -> None:
    requests = [REQUEST, MIXED, replace(REQUEST, with_gradient=False)]
    for one, other in zip(score_sync(reward_url, requests), score_async(reward_url, requests), strict=True):
        np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-6)
        assert (one.image_gradient is None) == (other.image_gradient is None)
        if one.image_gradient is not None and other.image_gradient is not None:
            for here, there in zip(one.image_gradient, other.image_gradient, strict=True):
                np.testing.assert_allclose(here, there, atol=1e-6)


def test_the_async_client_describes_the_service_as_the_sync_one_does(reward_url: str) -> None:
    async def ask() -> dict[str, str | None]:
        async with AsyncRewardClient(reward_url) as client:
            await client.wait_until_ready(timeout_s=30)
            return await client.models()

    with RewardClient(reward_url) as client:
        assert asyncio.run(ask()) == client.models()


def test_a_reward_that_is_not_loaded_yet_has_no_checksum(worker: Worker) -> None:
    async def nothing(request: RewardRequest, request_id: str) -> RewardResponse:
        raise AssertionError((request, request_id))

    later = RewardInfo.model_validate({"name": "later", "kind": "clip"})
    with serve_app(build_app(nothing, worker.infos | {"later": later}, LIMITS)) as url, RewardClient(url) as client:
        checksums = client.models()
    assert checksums["later"] is None
    assert (checksums["tiny-clip"] or "").startswith("sha256:")


@both_clients
def test_temporary_failures_are_retried_under_one_idempotency_key(app: ASGIApp, reward_url: str, score: Score) -> None:
    failing = FailsFirst(app, [status(500), breaks_off, status(503), answer_lost(app)])
    with serve_app(failing) as url:
        (retried,) = score(url, [REQUEST], max_attempts=5, backoff_s=0.01)
        score(url, [REQUEST])
    (direct,) = score(reward_url, [REQUEST])
    np.testing.assert_allclose(retried.rewards, direct.rewards, atol=1e-6)
    *of_one, of_other = failing.idempotency_keys
    assert len(of_one) == 5
    assert len(set(of_one)) == 1
    assert of_other not in {*of_one, ""}


def test_an_answer_that_was_lost_is_not_computed_again(worker: Worker) -> None:
    num_scored = 0

    async def scored(request: RewardRequest, request_id: str) -> RewardResponse:
        nonlocal num_scored
        num_scored += 1
        similarities = np.zeros((1, 2), np.float32)
        return RewardResponse(similarities[0], similarities, similarities, None, ("tiny",), request_id)

    app = build_app(scored, worker.infos, LIMITS)
    with serve_app(FailsFirst(app, [answer_lost(app)])) as url:
        score_sync(url, [replace(REQUEST, with_gradient=False)], backoff_s=0.01)
    assert num_scored == 1


@both_clients
def test_attempts_are_bounded(app: ASGIApp, score: Score) -> None:
    failing = FailsFirst(app, [status(503)] * 10)
    with serve_app(failing) as url, pytest.raises(RewardUnavailable, match="503: replica died"):
        score(url, [REQUEST], max_attempts=3, backoff_s=0.01)
    assert len(failing.idempotency_keys) == 3


@both_clients
def test_a_client_asked_to_come_back_comes_back_however_often(app: ASGIApp, score: Score) -> None:
    failing = FailsFirst(app, [status(503, retry_after="0"), status(429, retry_after="0")] * 5)
    with serve_app(failing) as url:
        score(url, [REQUEST], max_attempts=1)
    assert len(failing.idempotency_keys) == 11


@both_clients
def test_a_rejected_request_is_not_tried_again(app: ASGIApp, score: Score) -> None:
    failing = FailsFirst(app, [])
    with serve_app(failing) as url, pytest.raises(RewardRejected, match="beauty"):
        score(url, [replace(REQUEST, rewards=(WeightedReward("beauty"),))])
    assert len(failing.idempotency_keys) == 1


def test_the_key_is_taken_from_the_environment_and_never_shown(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SRPO_API_KEY", raising=False)
    with serve_app(reward_app(worker, LIMITS, keys=(SECRET,))) as url:
        with pytest.raises(RewardUnauthorized, match=r"401.*SRPO_API_KEY"):
            score_sync(url, [REQUEST])
        with pytest.raises(RewardUnauthorized) as refused:
            score_async(url, [REQUEST], api_key=f"{SECRET}x")
        assert SECRET not in str(refused.value)
        score_async(url, [REQUEST], api_key=SECRET)
        monkeypatch.setenv("SRPO_API_KEY", f"{SECRET}\n")  # as a file holds it
        score_sync(url, [REQUEST])


def test_a_key_that_no_header_can_carry_is_named_and_not_shown() -> None:
    with pytest.raises(RewardUnauthorized, match="SRPO_API_KEY") as refused:
        RewardClient("http://127.0.0.1:8000", api_key=f"{SECRET}\n{SECRET}")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:port", ""])
def test_a_bad_address_is_named(url: str) -> None:
    with pytest.raises(RewardUnreachable, match=r"no address.*http://127.0.0.1:8000"):
        RewardClient(url)


def test_another_service_at_the_address_is_recognized() -> None:
    with serve_app(HTMLResponse("<html>welcome</html>")) as url, RewardClient(url, max_attempts=1) as client:
        with pytest.raises(RewardUnavailable, match="does not speak"):
            client.score(REQUEST)
        with pytest.raises(RewardUnavailable, match="not the reward API"):
            client.models()


def test_an_address_where_nobody_listens_is_named_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    start = time.monotonic()
    with RewardClient(url, max_attempts=3, backoff_s=0.01) as client:
        with pytest.raises(RewardUnreachable, match=rf"{url} does not answer.*make up"):
            client.score(REQUEST)
        with pytest.raises(RewardUnreachable, match=r"no reward service is ready.*make up"):
            client.wait_until_ready(timeout_s=0.2)
    assert time.monotonic() - start < 10


@both_clients
def test_a_service_that_never_answers_is_given_up_in_bounded_time(score: Score) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RewardUnreachable, match="ReadTimeout"):
            score(url, [REQUEST], timeout_s=0.2, max_attempts=2, backoff_s=0.01)


# Without a network: the generator that both clients drive.


def calls_after(outcomes: Sequence[Answer | NoAnswer], api: RewardApi) -> list[Call]:
    exchange = api.score(REQUEST)
    return [next(exchange), *(exchange.send(outcome) for outcome in outcomes)]


def test_waits_double_up_to_ten_seconds_and_are_stretched_by_half_at_most() -> None:
    calls = calls_after([NoAnswer("reset")] * 7, RewardApi("http://service", backoff_s=0.5))
    waits_s = [call.after_s for call in calls]
    assert waits_s[0] == 0
    for wait_s, least_s in zip(waits_s[1:], [0.5, 1, 2, 4, 8, 10, 10], strict=True):
        assert least_s <= wait_s <= 1.5 * least_s


def test_by_default_a_killed_replica_may_be_away_for_a_minute() -> None:
    """Behind HAProxy each attempt fails at once until a new replica is up, which takes 10 to 40 s."""
    api = RewardApi("http://service")
    calls = calls_after([NoAnswer("reset")] * (api.max_attempts - 1), api)
    assert sum(call.after_s for call in calls) > 60
    assert RewardServiceConfig().max_attempts == api.max_attempts  # trainers are as patient


def test_callers_refused_together_come_back_apart() -> None:
    refused = Answer(503, {"retry-after": "1"}, b"")
    waits_s = {calls_after([refused], RewardApi("http://service"))[1].after_s for _ in range(10)}
    assert len(waits_s) == 10


@pytest.mark.parametrize(
    ("retry_after", "least_s", "most_s"), [("7", 7, 10.5), ("0", 0, 0), ("soon", 0.5, 0.75), ("-1", 0.5, 0.75)]
)
def test_retry_after_is_obeyed_where_it_can_be_read(retry_after: str, least_s: float, most_s: float) -> None:
    refused = Answer(429, {"retry-after": retry_after}, b"")
    assert least_s <= calls_after([refused], RewardApi("http://service"))[1].after_s <= most_s


@pytest.mark.parametrize(("seconds_from_now", "least_s", "most_s"), [(-60, 0, 0), (100, 60, 150)])
def test_retry_after_may_be_a_date(seconds_from_now: float, least_s: float, most_s: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds_from_now), usegmt=True)
    refused = Answer(503, {"retry-after": date}, b"")
    assert least_s <= calls_after([refused], RewardApi("http://service"))[1].after_s <= most_s


def test_nobody_waits_beyond_patience() -> None:
    refused = Answer(503, {"retry-after": "3600"}, b"")
    with pytest.raises(RewardBusy, match="503"):
        calls_after([refused], RewardApi("http://service", patience_s=60))
