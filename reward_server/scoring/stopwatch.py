"""Time work where it is done: on CUDA between marks in the device's own queue, which the CPU runs ahead of.

stopwatch = Stopwatch(device)
forward()
stopwatch.mark()
(seconds,) = stopwatch.seconds()     # once the device is known to have done the work
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Takes the time at its creation and at every mark."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        if self._stream is None:
            self._times.append(time.perf_counter())
        else:
            self._events.append(self._stream.record_event(torch.cuda.Event(enable_timing=True)))

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next."""
        if self._stream is None:
            return [end - start for start, end in pairwise(self._times)]
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._events)]
