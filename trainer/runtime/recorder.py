"""Write the run's record to MLflow in a thread of its own, in order, one call at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from services.clients.tracking import Tracker


class Recorder:
    """Writes worker 0's metrics, tags and files to MLflow while the training goes on.

    No error is lost: that of a call is raised by the next call, or by `close`.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: Future[None] | None = None

    def log(self, write: Callable[[Tracker], None]) -> None:
        """Have the thread call `write` with the MLflow run, after waiting for the previous call to end.

        Raises what the previous call raised.
        """
        self._wait()
        self._pending = self._pool.submit(write, self._tracker)

    def close(self) -> None:
        """Wait for the last call and end the thread. Raise what the call raised."""
        self._wait()
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
