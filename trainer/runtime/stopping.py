"""Stop a run on request: it saves a checkpoint after the step, or within a long one, and ends.

The request lies in the run's folder. The launcher makes it at a signal, a worker when it gives up, and the controller
before it changes the number of workers. Every worker watches for it in a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import ray
from ray._private.state import state as cluster_state  # no public call tells which nodes are draining

from services.clients.run_folder import RunFolder

_POLL_S = 0.25
_STEP_S = 10.0  # how long the watch lets a step come to its end by itself
_SAVE_S = 12.0  # how long a checkpoint within a step may take: together less than the launcher waits


class Stopped(Exception):  # it is an outcome, not an error
    """Raised on all workers when a run has stopped on request; the text is the reason."""


class StopWatch:
    """Watches for a request, and for the notice that a node will be taken away.

    If the step does not end in time, `save(timeout_s)` is called in the watch's thread. After a notice the training
    goes on until the node is gone.
    """

    def __init__(self, run: RunFolder, save: Callable[[float], None]) -> None:
        self._run, self._save = run, save
        self._is_left, self._is_saved, self._has_ended_step = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why the run must stop, or None."""
        request = self._run.stop_requested
        return None if request is None else request.reason

    @property
    def is_node_leaving(self) -> bool:
        """Whether this worker's node will be taken away."""
        return ray.get_runtime_context().get_node_id() in cluster_state.get_draining_nodes()

    def end_step(self) -> None:
        """Say that the training thread is between two steps, where it saves checkpoints itself."""
        self._has_ended_step.set()

    def wait_until_saved(self) -> None:
        """Wait until the watch has saved the last whole state, or could not."""
        self._is_saved.wait(_STEP_S + _SAVE_S)

    def close(self) -> None:
        """End the watch."""
        self._is_left.set()

    def _watch(self) -> None:
        has_served_notice = False
        while not self._is_left.wait(_POLL_S):
            if self.reason is not None:
                self._save_unless_step_ends()
                self._is_saved.set()
                return
            if self.is_node_leaving and not has_served_notice:
                self._save_unless_step_ends()
                has_served_notice = True

    def _save_unless_step_ends(self) -> None:
        self._has_ended_step.clear()
        if not self._has_ended_step.wait(_STEP_S) and not self._is_left.is_set():
            self._save(_SAVE_S)
