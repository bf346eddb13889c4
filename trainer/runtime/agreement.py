"""Let all workers agree between two steps: they learn worker 0's text, or whether something holds on each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def text_of_worker_0(text: str, device: torch.device) -> str:
    """Return worker 0's text on all workers."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()


def holds_everywhere(claim: bool, device: torch.device) -> bool:
    """Return whether the claim is true on every worker."""
    flag = torch.tensor([int(claim)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
