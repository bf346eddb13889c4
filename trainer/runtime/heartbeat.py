"""End a worker that hangs: one that does nothing for too long prints where it hangs and exits, and is replaced.

heartbeat = Heartbeat(minutes=15)
heartbeat.beat()            # at every forward and request
with heartbeat.paused():    # long work without beats: a model is written, a checkpoint is fetched
    ...
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """A limit on the time between two beats, from the first on. Its thread needs no lock of Python's."""

    def __init__(self, minutes: float) -> None:
        self._limit_s, self._is_paused = minutes * 60, False

    def beat(self) -> None:
        """Begin the limit anew."""
        if not self._is_paused:
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """Watch no longer, until the next beat."""
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch within the context, and begin the limit anew after it."""
        self._is_paused = True
        self.stop()
        try:
            yield
        finally:
            self._is_paused = False
            self.beat()
