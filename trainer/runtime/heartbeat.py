"""End a worker that hangs: one that does nothing for too long prints where it hangs and exits, and is replaced.

heartbeat = Heartbeat(minutes=15)
heartbeat.beat()      # at every forward, request and update
heartbeat.stop()
"""

from __future__ import annotations

import faulthandler
import sys


class Heartbeat:
    """A limit on the time between two beats. Its thread needs no lock of Python's, so a stuck call cannot stop it."""

    def __init__(self, minutes: float) -> None:
        self._limit_s = minutes * 60
        self.beat()

    def beat(self) -> None:
        """Begin the limit anew."""
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()
