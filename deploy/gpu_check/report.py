"""Keep one stage's results in a JSON file that is whole after every result, so that a stage cut short still tells."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# What a kernel, a backend or too little memory may raise: noted as that item's result, and the stage goes on.
FAILURES = (
    *(ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError, OSError),
    subprocess.SubprocessError,  # a compiler that is not there
)
_MAX_ERROR_CHARACTERS = 500


class Report:
    """Results by name, and checks of numbers against limits. `status` is running, done, or failed."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._started = path, time.perf_counter()
        self._tree: dict[str, Any] = {"stage": stage, "status": "running", "seconds": 0.0, "results": {}, "checks": []}
        self._write()

    def add(self, name: str, result: Any) -> None:
        """Note a result: numbers, texts, lists and dicts of these."""
        self._tree["results"][name] = result
        self._write()

    def check(self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """Note a number and whether it keeps its limit. NaN keeps none."""
        is_within = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        limit = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
        is_within = is_within and not math.isnan(value)
        self._tree["checks"].append({"name": name, "value": value, "limit": limit, "is_within": is_within})
        self._write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note an error raised within the context as the result of that name, and free what it held."""
        try:
            yield
        except FAILURES as error:
            self.add(name, {"error": describe(error)})
            error.__traceback__ = None  # its frames hold tensors
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def finish(self, status: str, error: str | None = None) -> None:
        """End the stage as done or failed."""
        self._tree |= {"status": status} | ({} if error is None else {"error": error})
        self._write()

    def _write(self) -> None:
        self._tree["seconds"] = round(time.perf_counter() - self._started, 2)
        write_json(self._path, self._tree)


def describe(error: BaseException) -> str:
    """Return an error's kind and the beginning of its text, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_ERROR_CHARACTERS]


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a file that is never seen half written. A number that JSON has no word for becomes null."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(_finite(tree), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
