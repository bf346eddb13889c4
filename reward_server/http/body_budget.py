"""The bytes of all bodies that are being read or answered, bounded: who comes beyond is told to come back.

    with in_flight.share() as take:    # given back at the end of the block, however it ends
        take(len(chunk))               # raises Overloaded

Counted as they arrive, not as announced: a caller who promises much and sends nothing keeps nobody out. What is made of
a body (pixels, gradients) comes on top. Lives in one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reward_server.scoring.batching import Overloaded


class BytesInFlight:
    """At most max_bytes at a time; `num_bytes` of them are taken."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """One request's share: a function that adds to it and raises Overloaded where that would be too much."""
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self.num_bytes + num_bytes > self._max_bytes:
                raise Overloaded(f"{self.num_bytes} bytes of requests are in work, of {self._max_bytes} that may be")
            self.num_bytes += num_bytes
            taken += num_bytes

        try:
            yield take
        finally:
            self.num_bytes -= taken
