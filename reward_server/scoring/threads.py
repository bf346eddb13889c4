"""Run long work in a thread, so that the event loop serves other callers; short work stays on the loop.

This does not use starlette's run_in_threadpool: its threads end with the task that first called it, and under Ray Serve
each request is such a task, so each would start threads of its own. The threads here stay, and they are few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_MAX_INLINE_BYTES = 1 << 20
_Result = TypeVar("_Result")


async def in_thread(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Return function(*arguments), called in a thread."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def in_thread_if_large(num_bytes: int, function: Callable[..., _Result], *arguments: object) -> _Result:
    """Return function(*arguments), called in a thread if it works on many bytes."""
    if num_bytes <= _MAX_INLINE_BYTES:
        return function(*arguments)
    return await in_thread(function, *arguments)
