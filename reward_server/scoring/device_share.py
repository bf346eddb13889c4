"""Hold this process to its share of a GPU's memory, since Ray Serve counts `num_gpus` and does not enforce it.

Without it the first of several replicas on a card takes what it can get, and another one's batch fails for it.
"""

from __future__ import annotations

import torch

CONTEXT_GIB = 0.6  # of each process: CUDA's context and kernels, which torch's allocator does not count
_GIB = 2**30


def hold_to_share(share: float) -> None:
    """Let torch take no more than `share` (num_gpus) of the process's card: beyond it is out of memory."""
    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed_fraction(share, total), 0)


def allowed_fraction(share: float, total_bytes: int) -> float:
    """Return what torch's allocator may have of a card, as a fraction. Raise ValueError if nothing is left of it."""
    fraction = share - CONTEXT_GIB * _GIB / total_bytes
    if fraction <= 0:
        raise ValueError(
            f"num_gpus {share:g} of a card of {total_bytes / _GIB:.1f} GiB is not more than the {CONTEXT_GIB} GiB "
            "that CUDA takes for each process"
        )
    return fraction
