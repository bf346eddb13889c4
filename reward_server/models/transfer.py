"""Copy between the CPU and a reward's device: on CUDA through pinned memory, while the device works; plainly elsewhere.

CUDA copies pinned memory without the CPU's help, and on streams of their own the copies in and out run beside the
kernels of other batches. On a CPU nothing is copied at all, and the numbers are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def joined(stacks: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
    """Join stacks of one dtype on the CPU, in pinned memory if they are to go to a CUDA device."""
    if device.type == "cuda":
        shape = sum(len(stack) for stack in stacks), *stacks[0].shape[1:]
        pinned = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, stacks[0].dtype)).dtype, pin_memory=True)
        np.concatenate(stacks, out=pinned.numpy())
        return pinned
    whole = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
    owned = whole if whole.flags.writeable else whole.copy()  # torch shares memory only with what may be written
    return torch.from_numpy(owned)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. On CUDA nothing waits but the work that is asked for after this."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    work, copies = torch.cuda.current_stream(device), _copies(device, "in")
    with torch.cuda.stream(copies):
        arrived = pinned.to(device, non_blocking=True)
    work.wait_stream(copies)
    arrived.record_stream(work)  # or its memory would be given to the next copy while kernels still read it
    return arrived


def to_cpu(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors of one device to the CPU; return a function that waits for them and returns them."""
    device = tensors[0].device
    if device.type != "cuda":
        arrived = [tensor.cpu() for tensor in tensors]
        return lambda: arrived
    copies = _copies(device, "out")
    copies.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(copies):
        pinned = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        are_done = copies.record_event()
    for tensor in tensors:
        tensor.record_stream(copies)

    def wait() -> list[Tensor]:
        are_done.synchronize()
        return pinned

    return wait


@cache
def _copies(device: torch.device, direction: Literal["in", "out"]) -> torch.cuda.Stream:
    """Return the stream of a direction: in one stream a copy in would wait for the results before it."""
    return torch.cuda.Stream(device)
