"""Decide what to send to the reward service, when to send it again, and what an answer means. No I/O here.

Each method of RewardApi is a generator: it yields the next Call, is sent its outcome, and returns the result or raises.
The sync and the async client (reward.py) only carry calls, so that they cannot behave differently.

RewardError
  RewardUnreachable     nothing answers at the address
  RewardUnavailable     the last attempt too was answered with 5xx, or with nonsense
    RewardBusy          429 or 503 with Retry-After, for longer than patience_s
  RewardRejected        the request itself is wrong (4xx); sending it again cannot help
    RewardUnauthorized  the API key is missing or wrong
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import numpy as np

from services.contract import (
    IDEMPOTENCY_KEY_HEADER,
    MEDIA_TYPE,
    MODELS_PATH,
    READY_PATH,
    REWARDS_PATH,
    ContractError,
    RewardRequest,
    RewardResponse,
)

# Scoring changes nothing on the server, so a request may be sent again after each of these. Serve answers 500 to open
# requests when a replica dies, and 503 if its queue is full or no replica is up; 408 is a body that came too slowly.
_TEMPORARY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_UNAUTHORIZED_STATUS = frozenset({401, 403})
_MAX_BACKOFF_S = 10.0
_MAX_JITTER = (
    1.5  # waits are multiplied by a factor drawn from [1, 1.5], so that callers refused together come back apart
)


class RewardError(RuntimeError):
    """The reward service did not answer the request; the text names its address and the cause."""


class RewardUnreachable(RewardError):
    """No connection, or no answer in time."""


class RewardUnavailable(RewardError):
    """The service failed in every attempt, or something else listens at its address."""


class RewardBusy(RewardUnavailable):
    """The service asked the client to come back later, for longer than patience_s allows."""


class RewardRejected(RewardError):
    """The service refused the request; the text holds the service's reason."""


class RewardUnauthorized(RewardRejected):
    """The service does not know the API key, or the request has none."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request to send after a wait of `after_s`."""

    method: str
    path: str
    timeout_s: float
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The failure of an attempt that got no answer."""

    cause: str


Result = TypeVar("Result")
Exchange = Generator[Call, Answer | NoAnswer, Result]


@dataclass(frozen=True, slots=True)
class RewardApi:
    """The service at `url`.

    timeout_s bounds each attempt's wait for the network. A request that failed is sent up to max_attempts times in all.
    The waits in between double from backoff_s to 10 s, by default 75 s or more together: a killed replica takes 10 to
    40 s to come back, and every attempt may fail at once until then. An answer with Retry-After is no failure: the
    client waits as long as it says, however often. Nothing is sent later than patience_s after the first attempt.
    """

    url: str
    timeout_s: float = 60.0
    max_attempts: int = 12
    backoff_s: float = 0.5
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {self.max_attempts}")

    def score(self, request: RewardRequest) -> Exchange[RewardResponse]:
        """Return the answer to `request`.

        All attempts carry one Idempotency-Key, so that the work for a lost answer is not done again.
        """
        headers = {"content-type": MEDIA_TYPE, IDEMPOTENCY_KEY_HEADER: uuid.uuid4().hex}
        answer = yield from self._answered(Call("POST", REWARDS_PATH, self.timeout_s, request.to_bytes(), headers))
        try:
            response = RewardResponse.from_bytes(answer.body)
            _check_answers(request, response)
        except ContractError as error:
            raise RewardUnavailable(f"{self.url} does not speak this version of the reward API: {error}") from error
        return response

    def models(self) -> Exchange[dict[str, str | None]]:
        """Return the rewards that are served: name -> checksum of the weights, None until they are loaded."""
        answer = yield from self._answered(Call("GET", MODELS_PATH, self.timeout_s))
        try:
            return {model["name"]: model["checksum"] for model in json.loads(answer.body)["models"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RewardUnavailable(f"{self.url}{MODELS_PATH} is not the reward API's: {error!r}") from error

    def ready(self, timeout_s: float) -> Exchange[None]:
        """Ask until the weights are loaded. Every failure may be temporary: the service may not even be started."""
        deadline = time.monotonic() + timeout_s
        call = Call("GET", READY_PATH, timeout_s)
        while True:
            outcome = yield call
            if isinstance(outcome, Answer) and outcome.status == 200:
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                state = outcome.cause if isinstance(outcome, NoAnswer) else f"HTTP {outcome.status}"
                raise RewardUnreachable(
                    f"no reward service is ready at {self.url} after {timeout_s:g} s ({state}): "
                    "start one with `make up`, or correct reward_service.url"
                )
            wait_s = min(self.backoff_s, left_s)
            call = replace(call, after_s=wait_s, timeout_s=max(left_s - wait_s, 0.1))

    def _answered(self, call: Call) -> Exchange[Answer]:
        """Return the answer to `call`. Raise the RewardError of the last attempt."""
        give_up_at, num_failures = time.monotonic() + self.patience_s, 0
        while True:
            outcome = yield call
            if isinstance(outcome, Answer) and 200 <= outcome.status < 300:
                return outcome
            error = self._error(call, outcome)
            requested_s = _retry_after_s(outcome)
            num_failures += requested_s is None
            wait_s = (
                min(self.backoff_s * 2 ** (num_failures - 1), _MAX_BACKOFF_S) if requested_s is None else requested_s
            )
            wait_s *= random.uniform(1, _MAX_JITTER)
            is_last = num_failures == self.max_attempts or time.monotonic() + wait_s > give_up_at
            if is_last or isinstance(error, RewardRejected):
                raise error
            call = replace(call, after_s=wait_s)

    def _error(self, call: Call, outcome: Answer | NoAnswer) -> RewardError:
        """Return the error that a failed attempt means."""
        if isinstance(outcome, NoAnswer):
            return RewardUnreachable(
                f"reward service at {self.url} does not answer ({outcome.cause}): "
                "start one with `make up`, or correct reward_service.url"
            )
        text = f"{call.method} {self.url}{call.path} answered {outcome.status}: {_error_text(outcome)}"
        if outcome.status in _UNAUTHORIZED_STATUS:
            return RewardUnauthorized(f"{text}: set SRPO_API_KEY to one of the service's keys")
        if outcome.status not in _TEMPORARY_STATUS:
            return RewardRejected(text)
        return RewardUnavailable(text) if _retry_after_s(outcome) is None else RewardBusy(text)


def _check_answers(request: RewardRequest, response: RewardResponse) -> None:
    """Raise ContractError if shapes do not fit the request; they would be broadcast silently in the trainer."""
    batch, num_rewards = len(request.pairs), len(request.rewards)
    if response.rewards.shape != (batch,):
        raise ContractError(f"rewards are {response.rewards.shape} for {batch} images")
    for similarities in (response.positive_similarities, response.negative_similarities):
        if similarities.shape != (num_rewards, batch):
            raise ContractError(f"similarities are {similarities.shape} for {num_rewards} rewards of {batch} images")
    if request.with_gradient:
        gradient = response.image_gradient
        sent, got = (
            [image.shape for image in images] for images in (request.images, () if gradient is None else gradient)
        )
        if sent != got or isinstance(gradient, np.ndarray) != isinstance(request.images, np.ndarray):
            raise ContractError(f"image_gradient has shapes {got} for images {sent}")


def _retry_after_s(outcome: Answer | NoAnswer) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    value = outcome.headers.get("retry-after") if isinstance(outcome, Answer) else None
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _error_text(answer: Answer) -> str:
    """Return the service's own message, or the start of another body."""
    try:
        fields = json.loads(answer.body)
        return f"{fields['error']} (request {fields['request_id']})"
    except (ValueError, KeyError, TypeError):
        return answer.body[:200].decode(errors="replace")
