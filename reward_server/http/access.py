"""Check API keys, limit the rate of each caller and the time of each body, as ASGI middleware that reads nothing early.

    check_binding("127.0.0.1", keys := read_keys(os.environ))   # raises AccessError before anything listens
    app.add_middleware(SlowBodies, body_timeout_s=60.0, chunk_timeout_s=10.0)
    app.add_middleware(RateLimit, requests_per_s=50.0, burst=100)
    app.add_middleware(RequireKey, keys=keys)                    # added last, asked first

Only routes under /v1 need a key; the page, its files, /docs, /healthz and /readyz are open. app.py checks the size of a
body while it reads. TLS is the task of whatever stands in front of the service.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.status import HTTP_401_UNAUTHORIZED, HTTP_408_REQUEST_TIMEOUT, HTTP_429_TOO_MANY_REQUESTS
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEYS_VARIABLE = "SRPO_API_KEYS"  # comma separated; an old and a new one together while callers change over
_API_SEGMENT = "v1"
_ROUNDING = 1e-9  # of a token: a caller who waits exactly as long as the answer said is let in


class AccessError(ValueError):
    """The service must not start with these settings; the text names the variable or the address, and never a key."""


def read_keys(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys in SRPO_API_KEYS, () if it is not set. Raise AccessError for one that no header can carry."""
    text = environ.get(KEYS_VARIABLE, "")
    if not text.strip():
        return ()
    keys = tuple(key.strip() for key in text.split(","))
    for place, key in enumerate(keys, start=1):
        if not key or not all("!" <= letter <= "~" for letter in key):
            raise AccessError(
                f"{KEYS_VARIABLE}: key {place} of {len(keys)} is empty or has a character that is not visible ASCII"
            )
    return keys


def check_binding(host: str, keys: Collection[str]) -> None:
    """Raise AccessError if other machines could reach `host` and no key is set.

    Call it with the address of every listener before it listens (deployment.py): Serve's
    `http_options.host`, and 0.0.0.0 where HAProxy mode binds replicas to all interfaces.
    """
    if not keys and not _is_loopback(host):
        raise AccessError(
            f"refusing to listen on {host or 'all interfaces'} without API keys: anybody who reaches it could use the "
            f"service. Set {KEYS_VARIABLE}, or bind 127.0.0.1"
        )


def key_fingerprint(key: str) -> str:
    """Return what logs may show of a key: the first 8 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


class RequireKey:
    """Answers 401 to a request under /v1 without one of the keys; checks nothing if there are no keys."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._digests = [(hashlib.sha256(key.encode()).digest(), key_fingerprint(key)) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._digests or not _is_api(scope):
            await self._app(scope, receive, send)
            return
        scheme, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        fingerprint = self._fingerprint(presented.strip()) if scheme.lower() == "bearer" else None
        if fingerprint is None:
            error = "this route needs an API key: send the header `Authorization: Bearer KEY`"
            await _refuse(scope, receive, send, HTTP_401_UNAUTHORIZED, error, {"www-authenticate": "Bearer"})
            return
        scope.setdefault("state", {})["key_fingerprint"] = fingerprint
        await self._app(scope, receive, send)

    def _fingerprint(self, presented: str) -> str | None:
        """Return the fingerprint if the key is known. All digests are compared, so that the time tells nothing."""
        digest, found = hashlib.sha256(presented.encode()).digest(), None
        for known, fingerprint in self._digests:
            if hmac.compare_digest(digest, known):
                found = fingerprint
        return found


class TokenBuckets:
    """Token buckets, one for each caller: it holds `burst` tokens, gains `per_s` a second, and a request takes one.

    A caller sends at most burst + per_s · T requests in any T seconds. The last max_callers callers are remembered; a
    forgotten one starts with a full bucket, as it would after burst / per_s seconds without a request.
    """

    def __init__(self, per_s: float, burst: int, max_callers: int = 10_000) -> None:
        self._per_s, self._burst, self._max_callers = per_s, burst, max_callers
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens and when; the one used last is last

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, caller: str, now_s: float) -> float:
        """Take a token and return 0.0, or return the seconds until there is one."""
        tokens, then_s = self._buckets.pop(caller, (float(self._burst), now_s))
        tokens = min(self._burst, tokens + (now_s - then_s) * self._per_s)
        is_taken = tokens >= 1 - _ROUNDING
        self._buckets[caller] = (tokens - 1 if is_taken else tokens, now_s)
        if len(self._buckets) > self._max_callers:
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if is_taken else (1 - tokens) / self._per_s


class RateLimit:
    """Answers 429 with Retry-After if a key, or without keys a client's address, sends requests too often.

    Every replica counts for itself: with n replicas a key gets up to n times the rate. Without keys only this machine
    reaches the service, so all callers share one address, which X-Forwarded-For from loopback can change (uvicorn
    believes it): the limit then stops a runaway caller, but not a malicious one.
    """

    def __init__(
        self, app: ASGIApp, requests_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app, self._clock, self._per_s = app, clock, requests_per_s
        self._buckets = TokenBuckets(requests_per_s, burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wait_s = self._buckets.take(_caller(scope), self._clock()) if _is_api(scope) else 0.0
        if wait_s == 0.0:
            await self._app(scope, receive, send)
            return
        error = f"more than {self._per_s:g} requests per second; try again in {wait_s:.3g} s"
        headers = {"retry-after": str(math.ceil(wait_s))}
        await _refuse(scope, receive, send, HTTP_429_TOO_MANY_REQUESTS, error, headers)


class SlowBodies:
    """Answers 408 to a body that is not complete in time, or that pauses too long between two pieces.

    The error is raised where the app reads, so that the app's own handler answers it.
    """

    def __init__(self, app: ASGIApp, body_timeout_s: float, chunk_timeout_s: float) -> None:
        self._app, self._body_timeout_s, self._chunk_timeout_s = app, body_timeout_s, chunk_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline_s = time.monotonic() + self._body_timeout_s
        is_whole = False

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:  # from now on only the end of the connection can come
                return await receive()
            try:
                async with asyncio.timeout(min(self._chunk_timeout_s, deadline_s - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)

    def _too_slow(self) -> HTTPException:
        error = (
            f"the body came too slowly: it must be complete in {self._body_timeout_s:g} s, "
            f"without a pause of {self._chunk_timeout_s:g} s"
        )
        # close: the rest of the body must not be read as a new request
        return HTTPException(HTTP_408_REQUEST_TIMEOUT, error, headers={"connection": "close"})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # another name may resolve to anything


def _is_api(scope: Scope) -> bool:
    """Tell whether the path has a segment "v1", wherever the app is mounted."""
    return scope["type"] == "http" and _API_SEGMENT in scope["path"].split("/")


def _caller(scope: Scope) -> str:
    fingerprint: str | None = scope.get("state", {}).get("key_fingerprint")
    return fingerprint or (scope["client"] or ("unknown",))[0]


async def _refuse(
    scope: Scope, receive: Receive, send: Send, status: int, error: str, headers: Mapping[str, str]
) -> None:
    answer = {"error": error, "request_id": scope.get("state", {}).get("request_id", "")}  # as app.py's errors
    await JSONResponse(answer, status, headers)(scope, receive, send)
