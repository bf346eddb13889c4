"""Callers who each ask again as soon as they are answered, and what they saw: answers per second, waiting times."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from deploy.bench_reward.questions import Question

_TIMEOUT_S = 120.0


class BenchError(RuntimeError):
    """A server answered with an error or not at all: there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Seen:
    """answers_per_s over the whole run; seconds: of each request, from sending to the whole answer."""

    answers_per_s: float
    seconds: tuple[float, ...]


def drive(url: str, questions: Sequence[Question], num_callers: int) -> Seen:
    """Ask each question once, num_callers at a time, and wait for all answers. Raises BenchError."""
    remaining = iter(questions)  # shared: taking the next one is atomic
    start = time.perf_counter()
    with ThreadPoolExecutor(num_callers) as callers:
        waits = [callers.submit(_ask_in_turn, url, remaining) for _ in range(num_callers)]
        seconds = [each for wait in waits for each in wait.result()]
    return Seen(len(seconds) / (time.perf_counter() - start), tuple(seconds))


def ask(url: str, question: Question) -> bytes:
    """One answer. Raises BenchError."""
    connection = _connect(url)
    try:
        return _ask(connection, question)
    finally:
        connection.close()


def _ask_in_turn(url: str, remaining: Iterator[Question]) -> list[float]:
    connection, seconds = _connect(url), []
    try:
        for question in remaining:
            start = time.perf_counter()
            _ask(connection, question)
            seconds.append(time.perf_counter() - start)
    finally:
        connection.close()
    return seconds


def _connect(url: str) -> http.client.HTTPConnection:
    address = urlsplit(url)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=_TIMEOUT_S)


def _ask(connection: http.client.HTTPConnection, question: Question) -> bytes:
    """On the same connection as before, unless the server has closed it."""
    try:
        connection.request("POST", question.path, question.body, question.headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer to POST {question.path}: {error!r}") from error
    if answer.status != http.client.OK:
        raise BenchError(f"POST {question.path} answered {answer.status}: {content[:300]!r}")
    return content
