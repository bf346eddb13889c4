"""Store answers by Idempotency-Key, for a while and in bounded memory, and return them to retried requests.

    response = await answers.once(key, digest, compute)

Scoring changes nothing, so this only saves work and keeps answers equal. Another replica, or this one after a restart,
computes the answer again. For use in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from services.contract import IDEMPOTENCY_KEY_HEADER, ContractError

REPLAYED_HEADER = "idempotency-replayed"
_OVERHEAD_BYTES = 1024  # of an entry beside its answer, so that the bound in bytes also bounds the number of small ones


class ReusedKey(ContractError):
    """An Idempotency-Key that was already used for another request."""

    reason = "idempotency_key"


@dataclass(frozen=True, slots=True)
class _Stored:
    digest: bytes
    answer: bytes
    media_type: str | None
    expires_s: float

    @property
    def num_bytes(self) -> int:
        return len(self.answer) + _OVERHEAD_BYTES


class StoredAnswers:
    """The successful answers of the last ttl_s seconds; beyond max_bytes the oldest are dropped first."""

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._ttl_s, self._clock = max_bytes, ttl_s, clock
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._running: dict[str, tuple[bytes, asyncio.Event]] = {}
        self.num_bytes = 0

    async def once(self, key: str, digest: bytes, compute: Callable[[], Awaitable[Response]]) -> Response:
        """Return the stored answer to `key`, or wait for the one being computed, or compute it.

        digest: of route and body. Raise ReusedKey if the key was used with another digest, and what `compute` raises,
        which is not stored.
        """
        while (running := self._running.get(key)) is not None:
            _check_same(key, digest, running[0])
            await running[1].wait()
        self._forget_expired()
        if (stored := self._stored.get(key)) is not None:
            _check_same(key, digest, stored.digest)
            return Response(stored.answer, media_type=stored.media_type, headers={REPLAYED_HEADER: "true"})
        is_over = asyncio.Event()
        self._running[key] = digest, is_over
        try:
            answer = await compute()
            self._store(key, _Stored(digest, bytes(answer.body), answer.media_type, self._clock() + self._ttl_s))
        finally:
            del self._running[key]
            is_over.set()
        return answer

    def _store(self, key: str, stored: _Stored) -> None:
        if stored.num_bytes > self._max_bytes:
            return
        self._stored[key] = stored
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._max_bytes:
            self._forget_oldest()

    def _forget_expired(self) -> None:
        while self._stored and next(iter(self._stored.values())).expires_s <= self._clock():
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, forgotten = self._stored.popitem(last=False)
        self.num_bytes -= forgotten.num_bytes


def _check_same(key: str, digest: bytes, known: bytes) -> None:
    if digest != known:
        raise ReusedKey(f"{IDEMPOTENCY_KEY_HEADER} {key!r} was already used for another request; use a new one")
