"""End a run at once when a worker fails by a mistake that a restart would repeat, and describe why a run failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.cloudpickle
from ray.train import TrainingFailedError, UserCallback

from services.clients.reward import RewardRejected

# A worker would raise these again, because its work follows from run file and step alone. Other errors may not recur: a
# worker dies, a connection breaks with it, the reward service restarts.
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, FileNotFoundError, RewardRejected)


@contextmanager
def mistakes_named() -> Iterator[None]:
    """Raise any mistake within the context as a ValueError: Ray Train's controller knows none of our classes."""
    try:
        yield
    except _MISTAKES as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


class EndAtMistakes(UserCallback):
    """Ends a run at a mistake, even if Ray Train's failure policy would allow more failures."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise RuntimeError with the mistake. Ray Train gives up on it, as on any error of its controller."""
        del run_context
        for rank, failure in worker_exceptions.items():
            if isinstance(_original(failure), ValueError):
                raise RuntimeError(_describe(rank, failure))


def cause(error: TrainingFailedError) -> str:
    """Return in one line why a training failed."""
    if (ended := getattr(error, "controller_failure", None)) is not None:
        return str(ended).strip()
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return next((_describe(rank, failure) for rank, failure in failures.items()), str(error).strip())


def _describe(rank: int, failure: Exception) -> str:
    return f"worker {rank} failed for good: {str(_original(failure)).strip()}"


def _original(failure: Exception) -> BaseException:
    """Return the worker's own error, which Ray Train wraps with its traceback, or else the failure itself."""
    return getattr(failure, "_base_exc", failure)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the controller may lack our checkout
