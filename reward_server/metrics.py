"""Name all that the reward service counts and times, and the function type that records it.

deployment.py passes a `Record` (Ray's Prometheus export); app, middleware and scorer know only this file.

    with phase(record, "decode"):
        request = RewardRequest.from_bytes(body)
    record(REJECTS, 1, {"reason": "max_images"})
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Record = Callable[["Metric", float, Mapping[str, str]], None]  # metric, value, its labels; cheap, never raises


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. A value is added to a counter, observed by a histogram, and replaces the last one of a gauge."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()  # of a histogram's buckets


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

IMAGES = Metric("srpo_reward_images", "counter", "images scored", ("reward",))
BATCH_IMAGES = Metric("srpo_reward_batch_images", "histogram", "images in one forward", ("reward",), _SIZES)
PHASE_SECONDS = Metric(
    "srpo_reward_phase_seconds",
    "histogram",
    "seconds to decode, resize and encode a request, to wait for the model, of a batch's forward and backward",
    ("phase",),
    _SECONDS,
)
TEXT_CACHE_HITS = Metric(
    "srpo_reward_text_cache_hits", "counter", "texts whose embedding was in the cache", ("reward",)
)
TEXT_CACHE_MISSES = Metric("srpo_reward_text_cache_misses", "counter", "texts that had to be embedded", ("reward",))
REJECTS = Metric("srpo_reward_rejects", "counter", "requests answered with an error, by reason", ("reason",))
OUT_OF_MEMORY = Metric(
    "srpo_reward_out_of_memory", "counter", "forwards too large for the device's memory, halved or refused", ("reward",)
)
QUEUED_IMAGES = Metric("srpo_reward_queued_images", "gauge", "images that wait for the model")
METRICS = (
    IMAGES,
    BATCH_IMAGES,
    PHASE_SECONDS,
    TEXT_CACHE_HITS,
    TEXT_CACHE_MISSES,
    REJECTS,
    OUT_OF_MEMORY,
    QUEUED_IMAGES,
)

Phase = Literal["decode", "resize", "wait", "forward", "backward", "encode"]


def ignore(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Record nothing."""


@contextmanager
def phase(record: Record, name: Phase) -> Iterator[None]:
    """Time a block. One that raises is not timed: it is counted as a reject."""
    start = time.perf_counter()
    yield
    record(PHASE_SECONDS, time.perf_counter() - start, {"phase": name})
