"""Bound the bytes of all bodies that are being read or answered; a request beyond the bound gets 503 with Retry-After.

    with in_flight.share() as take:    # given back at the end of the block, however it ends
        take(len(chunk))               # raises Overloaded

Bytes count as they arrive, not as content-length announces them. Pixels and gradients made of a body come on top.
For use in one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reward_server.scoring.batching import Overloaded


class BytesInFlight:
    """Counts the bytes in flight: `num_bytes` now, at most max_bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Give one request a function that counts bytes as taken, and raises Overloaded if there are too many."""
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self.num_bytes + num_bytes > self._max_bytes:
                allowed = f"{self._max_bytes} (max_bytes_in_flight)"
                raise Overloaded(f"{self.num_bytes} bytes of requests are in flight; the limit is {allowed}")
            self.num_bytes += num_bytes
            taken += num_bytes

        try:
            yield take
        finally:
            self.num_bytes -= taken
