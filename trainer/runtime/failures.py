"""End a run at once when a worker fails by a mistake that a restart would repeat, and describe why a run failed.

Other failures restart the workers: a death, a connection that breaks with it, an error of a file that may pass. Lack of
memory is a mistake, because the next attempt would need as much: it names what to lower.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.cloudpickle
from ray.exceptions import OutOfMemoryError
from ray.train import TrainingFailedError, UserCallback

from services.clients.reward import RewardRejected
from trainer.runtime.out_of_memory import causes, memory_shortage

# File errors that stay until someone mends them. Others, such as EIO, ESTALE or ETIMEDOUT of a network drive, may pass.
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_LASTING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_NUMBER = re.compile(r"\(os error (\d+)\)")  # as safetensors writes it into the text
# A worker would raise these again, because its work follows from run file and step alone.
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, RewardRejected, *_LASTING)


@contextmanager
def mistakes_named(what_to_lower: str = "") -> Iterator[None]:
    """Raise any mistake within the context as a ValueError: Ray Train's controller knows none of our classes.

    A mistake whose cause is a file error that may pass is none, and raised as that error. `what_to_lower` is said if
    memory is short.
    """
    try:
        yield
    except (*_MISTAKES, RuntimeError, MemoryError, OSError) as error:
        if shortage := memory_shortage(error):
            raise ValueError(_out_of_memory(shortage, what_to_lower)) from error
        if not (isinstance(error, _MISTAKES) or _number(error) in _LASTING_NUMBERS):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if passing := next(filter(is_passing, causes(error)), None):
            raise OSError(_number(passing) or errno.EIO, text) from error
        raise ValueError(text) from error


def is_passing(error: BaseException) -> bool:
    """Return whether an error is of reading or writing and may be gone at the next attempt.

    >>> is_passing(OSError(errno.ESTALE, "Stale file handle")), is_passing(PermissionError(errno.EACCES, "denied"))
    (True, False)
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    number = _number(error)
    lasts = number in _LASTING_NUMBERS or isinstance(OSError(number, ""), _LASTING)
    return number is not None and not lasts


class EndAtMistakes(UserCallback):
    """Ends a run at a mistake, even if Ray Train's failure policy would allow more failures."""

    def __init__(self, what_to_lower: str = "") -> None:
        self._what_to_lower = what_to_lower

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise RuntimeError with the mistake. Ray Train gives up on it, as on any error of its controller."""
        del run_context
        for rank, failure in worker_exceptions.items():
            original = _original(failure)
            if isinstance(original, ValueError):
                raise RuntimeError(_describe(rank, str(original)))
            if isinstance(original, OutOfMemoryError):
                first = str(original).strip().splitlines()[0]
                raise RuntimeError(_describe(rank, _out_of_memory(first, self._what_to_lower)))


def cause(error: TrainingFailedError) -> str:
    """Return in one line why a training failed."""
    if (ended := getattr(error, "controller_failure", None)) is not None:
        return str(ended).strip()
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return next((_describe(rank, str(_original(each))) for rank, each in failures.items()), str(error).strip())


def _describe(rank: int, text: str) -> str:
    return f"worker {rank} failed for good: {text.strip()}"


def _out_of_memory(shortage: str, what_to_lower: str) -> str:
    return f"out of memory: {shortage}" + (f": {what_to_lower}" if what_to_lower else "")


def _number(error: BaseException) -> int | None:
    """Return the system's number of a file error."""
    if not isinstance(error, OSError):
        return None
    found = _NUMBER.search(str(error))
    return error.errno or (int(found[1]) if found else None)


def _original(failure: BaseException) -> BaseException:
    """Return the worker's own error, or how it died. Ray Train wraps both."""
    return getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None) or failure


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the controller may lack our checkout
