"""Recognize an error that means "out of memory", and say which keys of a run file need less of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psutil

from services.config.run import RunConfig

_GIB = 2**30
# What CUDA's allocator, its libraries and the CPU's allocator say; numpy and Python raise MemoryError.
_WORDS = re.compile(r"out of memory|can't allocate memory|_ALLOC_FAILED", re.IGNORECASE)
_CPU_TRIED = re.compile(r"you tried to allocate (\d+) bytes")
_ADVICE = " If reserved but"  # begins what CUDA's message says after the numbers


def memory_shortage(error: BaseException) -> str | None:
    """Return what ran out, with the numbers that are known; None if the error or its causes mean something else."""
    for each in causes(error):
        if isinstance(each, MemoryError) or (_is_of_torch(each) and _WORDS.search(str(each))):
            return _describe(each)
    return None


def what_to_lower(config: RunConfig) -> str:
    """Return the values of the keys that decide how much memory a worker needs, and what to do about each."""
    engine, model = config.engine, config.model
    height_px, width_px = max(model.training_sizes, key=lambda size: size[0] * size[1])
    lower = [f"engine.micro_batch {engine.micro_batch}"] if engine.micro_batch > 1 else []
    lower += [f"model.height_px × width_px {height_px} × {width_px}", f"evaluation.batch {config.evaluation.batch}"]
    change = {
        "engine.gradient_checkpointing true": engine.gradient_checkpointing,
        "model.dtype bfloat16": model.dtype == "bfloat16",
        f"engine.zero_stage 3 (now {engine.zero_stage})": engine.zero_stage == 3,
        "finetune.kind lora": config.finetune.kind == "lora",
    }
    left = [setting for setting, is_set in change.items() if not is_set]
    return f"lower {', '.join(lower)}" + (f"; or set {', '.join(left)}" if left else "")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, as a traceback shows them."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _is_of_torch(error: BaseException) -> bool:
    """Return whether torch may have raised it; what a service answers may tell of its memory, not of the worker's."""
    return type(error) is RuntimeError or type(error).__module__.partition(".")[0] == "torch"


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    tried = _CPU_TRIED.search(text)
    if tried is None and not isinstance(error, MemoryError):
        return text.partition(_ADVICE)[0].removesuffix(".")
    memory = psutil.virtual_memory()
    what = f"tried to allocate {int(tried[1]) / _GIB:.2f} GiB" if tried else text or "an allocation failed"
    return f"{what}; the machine has {memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB of it free"
