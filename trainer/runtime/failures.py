"""Which failure of a worker ends a run at once, and what is told of it: a mistake is not mended by another start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.cloudpickle
from ray.train import TrainingFailedError, UserCallback

from services.clients.reward import RewardRejected

# What a worker would raise again, as its work follows from run file and step alone. All else may pass: a worker that
# dies, a connection that breaks with it, a reward service that is being restarted.
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, FileNotFoundError, RewardRejected)


@contextmanager
def mistakes_named() -> Iterator[None]:
    """Around a worker's work: raises ValueError for any mistake, as Ray Train's controller knows no class of ours."""
    try:
        yield
    except _MISTAKES as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


class EndAtMistakes(UserCallback):
    """Ends a run at a mistake, whatever number of failures it would survive."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise RuntimeError with the mistake, on which Ray Train gives up, as at any error of its controller."""
        del run_context
        for rank, failure in worker_exceptions.items():
            if isinstance(_raised(failure), ValueError):
                raise RuntimeError(_told(rank, failure))


def cause(error: TrainingFailedError) -> str:
    """What made a training fail, in one line."""
    if (ended := getattr(error, "controller_failure", None)) is not None:
        return str(ended).strip()
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return next((_told(rank, failure) for rank, failure in failures.items()), str(error).strip())


def _told(rank: int, failure: Exception) -> str:
    return f"worker {rank} failed for good: {str(_raised(failure)).strip()}"


def _raised(failure: Exception) -> BaseException:
    """What a worker's own code raised, which Ray Train wraps together with its traceback; else the failure itself."""
    return getattr(failure, "_base_exc", failure)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the controller may not find our checkout
