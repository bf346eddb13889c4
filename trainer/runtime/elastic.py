"""Change a run's number of workers without losing a step: it saves a checkpoint before Ray Train resizes it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray.cloudpickle
from ray.train.v2._internal.execution.callback import ControllerCallback  # the public callbacks know of no resize

from services.clients.run_folder import RunFolder

RESIZE_S = 30.0  # how often Ray Train looks for room for more workers
_SAVE_S = 25.0
_POLL_S = 0.2


class CheckpointBeforeResize(ControllerCallback):
    """Asks the workers to save and to leave, and waits, before the controller replaces them by more or fewer."""

    def __init__(self, run: Path) -> None:
        self._run = RunFolder(run)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Have the run's state saved. Without an answer in time the run repeats the steps since its last checkpoint."""
        if type(current_state).__name__ != "ResizingState":
            return
        num_workers = current_state.scaling_decision.num_workers
        self._run.request_stop(f"for a moment, to go on with {num_workers} workers")
        deadline = time.monotonic() + _SAVE_S
        while not self._run.is_stop_saved and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._run.forget_stop()


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the controller may lack our checkout
