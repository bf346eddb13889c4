"""Wait for a training on Ray Train to end. At a signal have it save a checkpoint and stop, within half a minute."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer

from services.clients.run_folder import RunFolder
from trainer.runtime.failures import cause

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP_S = 26.0  # from the signal until the workers are cut off; schedulers kill after 30 s
_POLL_S = 0.2


class LaunchError(RuntimeError):
    """The run failed for good; the text names the cause."""


class StoppedError(RuntimeError):
    """The run stopped on request; the text is the reason."""


def fit(trainer: TorchTrainer, run: RunFolder) -> None:
    """Train. Raise LaunchError if the training fails for good, and StoppedError if it was asked to stop.

    After a stop, workers may be left: ray.shutdown ends them.
    """
    outcome: Future[None] = Future()
    threading.Thread(target=_fit, args=(trainer, outcome), name="fit", daemon=True).start()
    with _stopping_at_signals(run) as stop:
        while not outcome.done() and not stop.is_overdue:
            time.sleep(_POLL_S)
    if outcome.done() and (error := outcome.exception()) is not None:
        raise LaunchError(str(error)) from error
    if (reason := stop.reason or (request.reason if (request := run.stop_requested) else None)) is not None:
        raise StoppedError(reason)


@dataclass
class _Stop:
    """The signal that this process got, if any, and when the workers are cut off."""

    reason: str | None = None
    deadline: float = math.inf

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() > self.deadline


def _fit(trainer: TorchTrainer, outcome: Future[None]) -> None:
    try:
        trainer.fit()
    except TrainingFailedError as error:
        outcome.set_exception(LaunchError(cause(error)))
    except BaseException as error:  # noqa: BLE001  # the waiting thread raises it
        outcome.set_exception(error)
    else:
        outcome.set_result(None)


@contextmanager
def _stopping_at_signals(run: RunFolder) -> Iterator[_Stop]:
    """Ask the run to stop at the first signal within the context; a second one interrupts at once."""
    asked = _Stop()

    def stop(number: int, _: FrameType | None) -> None:
        if asked.reason is not None:
            raise StoppedError("at the second signal")
        asked.reason, asked.deadline = signal.Signals(number).name, time.monotonic() + _STOP_S
        print(f"{asked.reason}: the run saves a checkpoint and stops, in {_STOP_S:g} s at the latest", flush=True)
        run.request_stop(asked.reason)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
