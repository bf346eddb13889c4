from __future__ import annotations

import asyncio
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from reward_server.http.access import (
    AccessError,
    RateLimit,
    RequireKey,
    TokenBuckets,
    check_binding,
    key_fingerprint,
    read_keys,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_binding(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.5", "localhost.example.org", "127.0.0.1.example.org"])
def test_beyond_loopback_without_keys_is_refused(host: str) -> None:
    with pytest.raises(AccessError, match=r"without API keys.*SRPO_API_KEYS"):
        check_binding(host, ())
    check_binding(host, ("a-key",))


@pytest.mark.parametrize(
    ("text", "keys"), [("", ()), ("  ", ()), ("one", ("one",)), ("old-key, new-key", ("old-key", "new-key"))]
)
def test_keys_are_read_from_the_environment(text: str, keys: tuple[str, ...]) -> None:
    assert read_keys({"SRPO_API_KEYS": text}) == keys
    assert read_keys({}) == ()


@pytest.mark.parametrize("text", ["one,,two", "one,", ",", "one two", "one\ntwo", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(AccessError, match=r"SRPO_API_KEYS: key \d of \d") as caught:
        read_keys({"SRPO_API_KEYS": text})
    assert not any(part in str(caught.value) for part in ("one", "two", "schlüssel"))


class Inside:
    """An ASGI app that notes who came in."""

    def __init__(self) -> None:
        self.callers: list[str | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.callers.append(scope.get("state", {}).get("key_fingerprint"))


async def no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def knock(keys: tuple[str, ...], authorization: str | None, path: str = "/v1/rewards") -> list[str | None]:
    inside, headers = Inside(), []
    if authorization is not None:
        headers = [(b"authorization", authorization.encode("latin-1"))]
    scope = {"type": "http", "path": path, "root_path": "", "headers": headers, "client": None}

    async def ignore(message: Message) -> None:
        pass

    await RequireKey(inside, keys)(scope, no_body, ignore)
    return inside.callers


OLD, NEW = "old-key-0123456789", "new-key-0123456789"


@pytest.mark.parametrize("key", [OLD, NEW])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_old_and_new_key_open_while_callers_change_over(key: str, scheme: str) -> None:
    assert asyncio.run(knock((OLD, NEW), f"{scheme} {key}")) == [key_fingerprint(key)]


@pytest.mark.parametrize(
    "authorization",
    [None, "", OLD, f"Basic {OLD}", "Bearer", "Bearer ", f"Bearer {OLD[:-1]}", f"Bearer {OLD}x", "Bearer \xff"],
)
def test_all_else_stays_out(authorization: str | None) -> None:
    assert asyncio.run(knock((OLD, NEW), authorization)) == []


@pytest.mark.parametrize("path", ["/v1/rewards", "/v1", "/v1/", "/mounted/here/v1/models", "//v1/models"])
def test_everything_under_v1_needs_a_key_wherever_the_app_is_mounted(path: str) -> None:
    assert asyncio.run(knock((OLD,), None, path)) == []


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/page/page.js", "/openapi.json"])
def test_page_documentation_and_probes_are_open(path: str) -> None:
    assert len(asyncio.run(knock((OLD,), None, path))) == 1


def test_without_keys_everything_is_open() -> None:
    assert asyncio.run(knock((), None)) == [None]


@pytest.mark.parametrize("presented", [OLD, NEW, "neither"])
def test_every_key_is_compared_whichever_fits(presented: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare_digest(a, b)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", noted)
    asyncio.run(knock((OLD, NEW, "x" * 200), f"Bearer {presented}"))
    assert compared == [(32, 32)] * 3


def test_a_fingerprint_tells_keys_apart_and_does_not_contain_them() -> None:
    assert key_fingerprint(OLD) != key_fingerprint(NEW)
    assert len(key_fingerprint(OLD)) == 8
    assert key_fingerprint("a") == "ca978112"  # sha256sum's first eight


RATES = st.floats(0.01, 1000)
PAUSES = st.lists(st.floats(0, 100), min_size=1, max_size=60)


def test_a_request_too_many_gets_retry_after() -> None:
    now_s, inside, sent = 0.0, Inside(), list[Message]()
    limited = RateLimit(inside, requests_per_s=0.1, burst=2, clock=lambda: now_s)

    async def send(message: Message) -> None:
        sent.append(message)

    def ask(key: str, path: str = "/v1/models") -> int:
        scope = {"type": "http", "path": path, "state": {"key_fingerprint": key, "request_id": "id-1"}}
        asyncio.run(limited(scope, no_body, send))
        return len(inside.callers)

    assert [ask("a"), ask("a"), ask("a"), ask("b"), ask("a", "/healthz")] == [1, 2, 2, 3, 4]
    start, body = sent
    assert start["status"] == 429
    assert (b"retry-after", b"10") in start["headers"]
    assert json.loads(body["body"])["request_id"] == "id-1"
    now_s = 10.0
    assert ask("a") == 5


@given(per_s=RATES, burst=st.integers(1, 50), pauses=PAUSES)
def test_no_window_lets_in_more_than_burst_and_what_flowed_in(per_s: float, burst: int, pauses: list[float]) -> None:
    buckets, now, let_in = TokenBuckets(per_s, burst), 0.0, []
    for pause in pauses:
        now += pause
        if buckets.take("caller", now) == 0.0:
            let_in.append(now)
    for first, start in enumerate(let_in):
        for last, end in enumerate(let_in[first:], start=first):
            assert last - first + 1 <= burst + per_s * (end - start) + 1e-6


@given(per_s=RATES, burst=st.integers(1, 50), num_requests=st.integers(1, 100))
def test_a_caller_that_waits_as_long_as_retry_after_is_let_in(per_s: float, burst: int, num_requests: int) -> None:
    buckets, now = TokenBuckets(per_s, burst), 0.0
    for index in range(num_requests):
        wait_s = buckets.take("caller", now)
        assert (wait_s == 0.0) == (index < burst)
        now += wait_s
        assert wait_s == 0.0 or buckets.take("caller", now) == 0.0


def test_one_caller_does_not_use_up_another_ones_tokens() -> None:
    buckets = TokenBuckets(per_s=1.0, burst=1)
    assert buckets.take("a", 0.0) == 0.0
    assert buckets.take("a", 0.0) == pytest.approx(1.0)
    assert buckets.take("b", 0.0) == 0.0


def test_memory_is_bounded_and_it_is_the_longest_silent_who_is_forgotten() -> None:
    buckets = TokenBuckets(per_s=1e-6, burst=1, max_callers=100)
    for index in range(1000):
        buckets.take(f"caller {index}", float(index))
    assert len(buckets) == 100
    assert buckets.take("caller 999", 1000.0) > 0.0  # remembered: its bucket is still empty
    assert buckets.take("caller 0", 1000.0) == 0.0
