"""Wait for a training on Ray Train to end. At a signal have it save a checkpoint and stop, within half a minute."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
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
    with _stopping_at_signals(run):
        while not outcome.done():
            time.sleep(_POLL_S)
            requested = run.stop_requested
            if requested is not None and time.time() - requested.at > _STOP_S:
                break
    request = run.stop_requested
    if outcome.done() and (error := outcome.exception()) is not None:
        raise LaunchError(str(error)) from error
    if request is not None:
        raise StoppedError(request.reason)


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
def _stopping_at_signals(run: RunFolder) -> Iterator[None]:
    """Ask the run to stop at the first signal within the context; a second one interrupts at once."""

    def stop(number: int, _: FrameType | None) -> None:
        if run.stop_requested is not None:
            raise StoppedError("at the second signal")
        name = signal.Signals(number).name
        print(f"{name}: the run saves a checkpoint and stops, in {_STOP_S:g} s at the latest", flush=True)
        run.request_stop(name)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
