"""Answer a device's lack of memory as "come back later": the only place that catches it.

    with short_of_memory("8 images of 720 x 720 pixels for reward 'hpsv2.1'"):
        columns = score(chunk)          # raises OutOfMemory in place of what torch raises

By then the device's memory has back what the failed work held, so that half of it may be tried.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reward_server.scoring.batching import Overloaded

_RETRY_AFTER_S = 5  # in which batches and other processes on the card end; no longer, for memory may be free at once
# torch.OutOfMemoryError is the allocator's. cuBLAS and cuDNN have workspaces of their own, and the driver has limits.
_OF_LIBRARIES = re.compile(r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC_FAILED")


class OutOfMemory(Overloaded):
    """Work that the device has no memory for at present."""


@contextmanager
def short_of_memory(what: str) -> Iterator[None]:
    """Raise OutOfMemory naming `what` where the block runs out of the device's memory; other errors stay as they are.

    The block should be one call: what its own frame holds cannot be given back.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or _OF_LIBRARIES.search(str(error))):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        torch.cuda.empty_cache()  # pieces too small for half of the work go back too; without CUDA it does nothing
        raise OutOfMemory(f"the device has no memory for {what}", _RETRY_AFTER_S) from None
