"""Measure seconds and peak memory by phase. The device is synchronised at both ends, so a phase has its own work only.

meter = Meter(device)
meter.start("rollout")
...
meter.start("forward")  # ends the rollout
...
meter.stop()
meter.phases["rollout"]  # {"seconds": 4.1, "peak_gib": 31.2, "calls": 1}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

GIB = 2**30


class Meter:
    """Seconds (summed over calls) and peak memory (the largest of them) of each phase, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: tuple[str, float] | None = None
        self.phases: dict[str, dict[str, float]] = {}

    def start(self, name: str) -> None:
        """End the phase that runs, if one does, and begin another."""
        self.stop()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._running = name, time.perf_counter()

    def stop(self) -> None:
        """End the phase that runs."""
        synchronize(self._device)
        if self._running is None:
            return
        name, started = self._running
        seconds, self._running = time.perf_counter() - started, None
        entry = self.phases.setdefault(name, {"seconds": 0.0, "peak_gib": 0.0, "calls": 0})
        entry["seconds"] = round(entry["seconds"] + seconds, 5)
        entry["peak_gib"] = round(max(entry["peak_gib"], peak_gib(self._device)), 3)
        entry["calls"] += 1


def seconds_of(call: Callable[[], object], device: torch.device, *, num_warm_ups: int, num_calls: int) -> float:
    """Return the median of a call's seconds, each from idle device to idle device."""
    seconds = []
    for number in range(num_warm_ups + num_calls):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        if number >= num_warm_ups:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """Return the peak of tensors' memory since the count began. 0 on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def held_gib(device: torch.device) -> float:
    """Return the memory of all tensors now. 0 on a CPU."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
