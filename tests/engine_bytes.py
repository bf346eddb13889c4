"""Compare the bytes that a real engine holds with the planner's, in a worker of a started world."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from math import prod
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
_LAST_BIAS_BYTES = 12


def make_policy(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 103), nn.GELU(), nn.Linear(103, 3)
    return nn.Sequential(*layers).to(dtype)


def check_bytes(rank: int, num_workers: int, make_engine: Callable[..., Any], num_backwards: int) -> None:
    """What worker 0 holds after a step and while gradients add up is as planned, to the byte, in every stage."""
    for stage, dtype in [(0, torch.float32), *((s, t) for t in (torch.float32, torch.bfloat16) for s in (1, 2, 3))]:
        before = list(_tensors())  # kept alive, so that nothing new can lie where they are
        policy = make_policy(dtype)
        engine = make_engine(stage, dtype, policy=policy)
        layout = Layout(stage, num_workers, dtype.itemsize, is_gpu=False, settings=SETTINGS)
        planned = sharded(layout, SHAPES, 0, {})
        state = planned.weights + planned.masters + planned.moments
        held = []
        for _ in range(2):  # the first step makes the moments
            for _ in range(num_backwards):
                engine.backward(engine.transformer(torch.randn(2, 37).to(dtype)).float().square().mean())
                held.append(_new_bytes(before, policy))
            engine.step()
        if rank == 0:
            state += _LAST_BIAS_BYTES if (stage, dtype) == (1, torch.float32) else 0  # whose gradient DeepSpeed forgets
            # stage 3 keeps room for gradients, and stage 1 in bfloat16 for float32 ones
            kept = planned.gradients if stage == 3 else 0
            kept += SIZE * 4 if stage == 1 and dtype == torch.bfloat16 else 0
            assert _new_bytes(before, policy) == state + kept, f"stage {stage} in {dtype}, after a step"
            assert max(held) == state + planned.gradients, f"stage {stage} in {dtype}, before a step"


def _new_bytes(before: list[Tensor], policy: nn.Module) -> int:
    """Return the bytes of what is new, but for DeepSpeed's bucket, which is larger than all of it together."""
    grads = [each.grad for each in policy.parameters() if each.grad is not None]
    old, found = _storages(before), _storages([*_tensors(), *grads])
    return sum(size for key, size in found.items() if key not in old and size < _BUCKET_BYTES)


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def _tensors() -> Iterator[Tensor]:
    """Yield what is alive in this process, but for counters and flags, which are 0-d or no number of the model."""
    gc.collect()
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and each.dim() and each.dtype in (torch.float32, torch.bfloat16):
            yield each
