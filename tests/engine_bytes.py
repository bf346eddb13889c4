"""Compare the bytes that a real engine holds with the planner's, in a worker of a started world."""

from __future__ import annotations

import gc
from collections.abc import Callable
from math import prod
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.plan.sharding import Layout, sharded

SETTINGS = {"stage3_param_persistence_threshold": 16}  # as tests/workers.py sets it
SHAPES = {
    "0.weight": (101, 37),
    "0.bias": (101,),
    "2.weight": (103, 101),
    "2.bias": (103,),
    "4.weight": (3, 103),
    "4.bias": (3,),
}


SIZE = sum(map(prod, SHAPES.values()))
_BUCKET_BYTES = 10**9
_NOT_ITS_OWN = (type, ModuleType, FunctionType, FrameType)  # beyond them is everything


def make_policy(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 103), nn.GELU(), nn.Linear(103, 3)
    return nn.Sequential(*layers).to(dtype)


def check_bytes(rank: int, num_workers: int, make_engine: Callable[..., Any], num_backwards: int) -> None:
    """What worker 0 holds after a step and while gradients add up is as planned, to the byte, in every stage."""
    for stage, dtype in [(0, torch.float32), *((s, t) for t in (torch.float32, torch.bfloat16) for s in (1, 2, 3))]:
        engine = make_engine(stage, dtype, policy=make_policy(dtype))
        layout = Layout(stage, num_workers, dtype.itemsize, is_gpu=False, settings=SETTINGS)
        planned = sharded(layout, SHAPES, 0, {})
        state = planned.weights + planned.masters + planned.moments
        held = [0]
        for step in range(2):  # the first one makes the moments
            for _ in range(num_backwards):
                engine.backward(engine.transformer(torch.randn(2, 37).to(dtype)).float().square().mean())
                if step > 0 and rank == 0:
                    held.append(held_bytes(engine))
            engine.step()
        if rank == 0:
            # stage 3 keeps room for gradients, and stage 1 in bfloat16 for float32 ones
            kept = planned.gradients if stage == 3 else 0
            kept += SIZE * 4 if stage == 1 and dtype == torch.bfloat16 else 0
            assert held_bytes(engine) == state + kept, f"stage {stage} in {dtype}, after a step"
            assert max(held) == state + planned.gradients, f"stage {stage} in {dtype}, before a step"


def held_bytes(engine: Any) -> int:
    """Return the bytes of all tensors that an engine refers to, but for DeepSpeed's bucket, which none is as large as.

    Counters and flags, which are 0-d or no number of the model, are left out, as is what only has a shape (meta).
    """
    storages, seen, waiting = {}, set(), [engine]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _NOT_ITS_OWN):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.is_leaf and each.grad is not None:
                waiting.append(each.grad)
            if each.device.type == "cpu" and each.dim() and each.dtype in (torch.float32, torch.bfloat16):
                storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        waiting += gc.get_referents(each)
    return sum(size for size in storages.values() if size < _BUCKET_BYTES)
