"""Write the run's record to MLflow beside the training, in order, one call at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from services.clients.tracking import Tracker


class Recorder:
    """Worker 0's pen. MLflow is written beside the training, one call at a time.

    No record is lost in silence: the error of a call is raised by the next one, or by `close`.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: Future[None] | None = None

    def log(self, write: Callable[[Tracker], None]) -> None:
        """Hand one record over; waits while the one before it is being written."""
        self._wait()
        self._pending = self._pool.submit(write, self._tracker)

    def close(self) -> None:
        self._wait()
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
