"""Send requests from callers who each wait for an answer before the next, and measure rates and waiting times."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from deploy.bench_reward.requests import HttpRequest

_TIMEOUT_S = 120.0


class BenchError(RuntimeError):
    """A server answered with an error or not at all: there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What callers saw: answers_per_s over the whole run, seconds from sending each request to its full answer."""

    answers_per_s: float
    seconds: tuple[float, ...]


def drive(url: str, requests: Sequence[HttpRequest], num_callers: int) -> Seen:
    """Send each request once, num_callers at a time, and wait for all answers. Raise BenchError."""
    remaining = iter(requests)  # shared: taking the next one is atomic
    start = time.perf_counter()
    with ThreadPoolExecutor(num_callers) as callers:
        waits = [callers.submit(_send_in_turn, url, remaining) for _ in range(num_callers)]
        seconds = [each for wait in waits for each in wait.result()]
    return Seen(len(seconds) / (time.perf_counter() - start), tuple(seconds))


def send(url: str, request: HttpRequest) -> bytes:
    """Send one request and return the answer's body. Raise BenchError."""
    connection = _connect(url)
    try:
        return _post(connection, request)
    finally:
        connection.close()


def _send_in_turn(url: str, remaining: Iterator[HttpRequest]) -> list[float]:
    connection, seconds = _connect(url), []
    try:
        for request in remaining:
            start = time.perf_counter()
            _post(connection, request)
            seconds.append(time.perf_counter() - start)
    finally:
        connection.close()
    return seconds


def _connect(url: str) -> http.client.HTTPConnection:
    address = urlsplit(url)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=_TIMEOUT_S)


def _post(connection: http.client.HTTPConnection, request: HttpRequest) -> bytes:
    """Send it on the same connection as before, unless the server has closed that."""
    try:
        connection.request("POST", request.path, request.body, request.headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer to POST {request.path}: {error!r}") from error
    if answer.status != http.client.OK:
        raise BenchError(f"POST {request.path} answered {answer.status}: {content[:300]!r}")
    return content
