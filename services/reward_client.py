"""The only caller of the reward API: time-outs, bounded retries, errors that name the cure.

with RewardClient("http://127.0.0.1:8000") as client:
    client.wait_until_ready(timeout_s=60)
    response = client.score(request)

RewardError
  RewardUnreachable   nobody answers at the address
  RewardUnavailable   somebody answers, but with 5xx or nonsense, to the last attempt
  RewardRejected      the request itself is wrong (4xx); trying again cannot help
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import httpx

from services.contract import (
    MEDIA_TYPE,
    MODELS_PATH,
    READY_PATH,
    REWARDS_PATH,
    ContractError,
    RewardRequest,
    RewardResponse,
)

# Scoring changes nothing on the server, so every one of these may be tried again. Serve answers 500 to requests in
# flight when a replica dies, and 503 when its queue is full or no replica is up.
_RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
_MAX_WAIT_S = 10.0


class RewardError(RuntimeError):
    """The reward service did not answer the request; the text names its address and the cause."""


class RewardUnreachable(RewardError):
    """No connection, or no answer in time."""


class RewardUnavailable(RewardError):
    """The service failed to the last attempt, or something else listens at its address."""


class RewardRejected(RewardError):
    """The service refused the request; its own words are in the text."""


class RewardClient:
    """A connection to one reward service. Close it, or use it in a `with` block.

    timeout_s bounds each attempt; the waits between attempts double from backoff_s to 10 s. The defaults ride out the
    10-40 s that a killed replica takes to come back.
    """

    def __init__(self, url: str, timeout_s: float = 60.0, max_attempts: int = 8, backoff_s: float = 0.5) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
        self.url = url.rstrip("/")
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s)

    def score(self, request: RewardRequest) -> RewardResponse:
        """Rewards and, if asked for, image gradients, in the order of the request's images. Raises RewardError."""
        answer = self._send("POST", REWARDS_PATH, request.to_bytes())
        try:
            response = RewardResponse.from_bytes(answer.content)
            _check_answers(request, response)
        except ContractError as error:
            raise RewardUnavailable(f"{self.url} does not speak this version of the reward API: {error}") from error
        return response

    def models(self) -> dict[str, str]:
        """The rewards that may be asked for: name -> checksum of the weights. Raises RewardError."""
        answer = self._send("GET", MODELS_PATH)
        try:
            return {model["name"]: model["checksum"] for model in answer.json()["models"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RewardUnavailable(f"{self.url}{MODELS_PATH} is not the reward API's: {error!r}") from error

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once the service has its weights loaded; raise RewardUnreachable after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(deadline - time.monotonic(), 0.1)
                state = f"HTTP {(code := self._http.get(READY_PATH, timeout=left_s).status_code)}"
                if code == httpx.codes.OK:
                    return
            except httpx.TransportError as error:
                state = _describe(error)
            if time.monotonic() >= deadline:
                raise RewardUnreachable(
                    f"no reward service is ready at {self.url} after {timeout_s:g} s ({state}): "
                    "start one with `make up`, or correct reward_service.url"
                )
            time.sleep(min(self._backoff_s, max(deadline - time.monotonic(), 0)))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        """An answer below 400. Every attempt but the last may fail for a reason that passes."""
        for attempt in range(1, self._max_attempts):
            try:
                return self._attempt(method, path, body)
            except (RewardUnreachable, RewardUnavailable):
                time.sleep(min(self._backoff_s * 2 ** (attempt - 1), _MAX_WAIT_S))
        return self._attempt(method, path, body)

    def _attempt(self, method: str, path: str, body: bytes | None) -> httpx.Response:
        headers = {"content-type": MEDIA_TYPE} if body is not None else {}
        try:
            answer = self._http.request(method, path, content=body, headers=headers)
        except httpx.TransportError as error:
            raise RewardUnreachable(
                f"reward service at {self.url} does not answer ({_describe(error)}): "
                "start one with `make up`, or correct reward_service.url"
            ) from error
        if answer.is_success:
            return answer
        failure = RewardUnavailable if answer.status_code in _RETRIED_STATUS else RewardRejected
        raise failure(f"{method} {self.url}{path} answered {answer.status_code}: {_error_text(answer)}")


def _check_answers(request: RewardRequest, response: RewardResponse) -> None:
    """A shape that is not the request's would broadcast silently in the trainer."""
    if response.rewards.shape != (len(request.pairs),):
        raise ContractError(f"rewards are {response.rewards.shape} for {len(request.pairs)} images")
    if request.with_gradient and (
        response.image_gradient is None or response.image_gradient.shape != request.images.shape
    ):
        raise ContractError(f"no image_gradient of the images' shape {request.images.shape}")


def _error_text(answer: httpx.Response) -> str:
    """The service's own words, or the start of whatever else came."""
    try:
        fields = answer.json()
        return f"{fields['error']} (request {fields['request_id']})"
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _describe(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
