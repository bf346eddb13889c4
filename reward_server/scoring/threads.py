"""What would make the other callers wait leaves the event loop; what takes less than the way to a thread stays on it.

Not starlette's run_in_threadpool: its threads end with the task that called first, and under Ray Serve each request is
such a task, so each would start threads of its own. These stay, and they are few: Python runs one of them at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_MAX_INLINE_BYTES = 1 << 20
_Result = TypeVar("_Result")


async def off_loop(function: Callable[..., _Result], *arguments: object) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def off_loop_if_large(num_bytes: int, function: Callable[..., _Result], *arguments: object) -> _Result:
    """`function` works on so many bytes."""
    if num_bytes <= _MAX_INLINE_BYTES:
        return function(*arguments)
    return await off_loop(function, *arguments)
