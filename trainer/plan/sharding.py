"""Count what ZeRO leaves on a worker: weights, gradients, master weights, moments and buffers, to the byte. Pure.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py; tests compare with its engines.

| stage | gradients in float32 | gradients in bfloat16 |
|---|---|---|
| 0 | whole | refused |
| 1 | whole | whole in bfloat16 and in float32 |
| 2 | of each parameter that the worker has a part of | its part, in float32 |
| 3 | its part of each parameter | its part of each, in float32 |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from trainer.plan.tape import FLOAT32_BYTES, Shape

_ALIGNMENT = 2  # of a worker's range, in numbers
_DEFAULTS = {  # DeepSpeed's, in numbers
    "reduce_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How the engine lays out the parameters. settings: what engine.deepspeed says of zero_optimization."""

    stage: int
    num_workers: int
    itemsize: int
    is_gpu: bool
    settings: Mapping[str, Any]

    def setting(self, name: str) -> int:
        return int(self.settings.get(name, _DEFAULTS[name]))


@dataclass(frozen=True, slots=True)
class Sharded:
    """Bytes on worker 0, which has the most. own: numbers of its part of the trained parameters, without padding.

    buckets: in which gradients travel, alive in a backward. gathered: weights of stage 3 that are whole for a while.
    updating: what an optimizer step makes for a while.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    own: int
    buckets: int
    gathered: int
    updating: int


def sharded(layout: Layout, trained: Mapping[str, Shape], frozen_bytes: int, frozen: Mapping[str, Shape]) -> Sharded:
    """Return what a worker holds. frozen_bytes: of all frozen weights, whole; they are as the base is quantized."""
    sizes = [prod(shape) for shape in trained.values()]
    if layout.stage == 3:
        return _of_each(layout, sizes, frozen_bytes, [prod(shape) for shape in frozen.values()])
    total, itemsize = sum(sizes), layout.itemsize
    if layout.stage == 0:
        whole = total * FLOAT32_BYTES
        own = total // layout.num_workers
        return Sharded(total * itemsize + frozen_bytes, whole, 0, 2 * whole, own, 0, 0, _made(layout, total, 0))
    padded = _padded(total, _ALIGNMENT * layout.num_workers)
    own = padded // layout.num_workers
    copied = own if itemsize < FLOAT32_BYTES and layout.stage == 2 else 0
    return Sharded(
        padded * itemsize + frozen_bytes,
        _gradients(layout, sizes, padded, own),
        own * FLOAT32_BYTES,
        2 * own * FLOAT32_BYTES,
        min(own, total),
        _buckets(layout, total),
        0,
        _made(layout, own, copied),
    )


def _gradients(layout: Layout, sizes: list[int], padded: int, own: int) -> int:
    if layout.itemsize < FLOAT32_BYTES:
        return padded * FLOAT32_BYTES + sum(sizes) * layout.itemsize if layout.stage == 1 else own * FLOAT32_BYTES
    if layout.stage == 1:
        return sum(sizes) * FLOAT32_BYTES
    touched, offset = 0, 0
    for size in sizes:
        touched += size if offset < own else 0
        offset += size
    return touched * FLOAT32_BYTES


def _of_each(layout: Layout, trained: list[int], frozen_bytes: int, frozen: list[int]) -> Sharded:
    """Return what stage 3 leaves: a part of each parameter, and the small ones whole besides."""
    count, itemsize = layout.num_workers, layout.itemsize
    own = sum(_part(size, count) for size in trained)
    frozen_numbers = sum(frozen)
    frozen_part = sum(_part(size, count) for size in frozen) * frozen_bytes // max(frozen_numbers, 1)
    threshold = layout.setting("stage3_param_persistence_threshold")
    small = sum(_part(size, count) * count for size in (*trained, *frozen) if size <= threshold)
    live = min(layout.setting("stage3_max_live_parameters"), sum(trained) + frozen_numbers)
    live_itemsize = max(itemsize, 1)
    return Sharded(
        own * itemsize + frozen_part + small * itemsize,
        own * FLOAT32_BYTES,
        own * FLOAT32_BYTES,
        2 * own * FLOAT32_BYTES,
        own,
        _buckets(layout, sum(trained)),
        live * live_itemsize if count > 1 else 0,
        _made(layout, own, 0),
    )


def _buckets(layout: Layout, total: int) -> int:
    """The buffer of a bucket, and its copy in float32 on the way. A CPU has memory only for what is written."""
    size = layout.setting("reduce_bucket_size")
    numbers = size if layout.is_gpu else min(size, total)
    if layout.stage == 2 and layout.itemsize < FLOAT32_BYTES:
        return numbers * layout.itemsize + min(size, total) * FLOAT32_BYTES
    return numbers * FLOAT32_BYTES


def _made(layout: Layout, own: int, copied: int) -> int:
    """What AdamW's roots take, and a flat copy of the gradients. One root at a time on a GPU, a quotient on a CPU."""
    return (own * (1 if layout.is_gpu else 2) + copied) * FLOAT32_BYTES


def _padded(number: int, multiple: int) -> int:
    return _part(number, multiple) * multiple


def _part(size: int, count: int) -> int:
    return -(-size // count)
