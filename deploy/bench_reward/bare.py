"""Measure the bare model: a CLIPModel's image tower in a loop, in as many processes as the service has."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

_clip: Any = None  # of a process of the pool


class BareModel:
    """Runs the model in num_processes processes of one torch thread each."""

    def __init__(self, pool: Pool, num_processes: int, size_px: int) -> None:
        self._pool, self._num_processes, self._size_px = pool, num_processes, size_px

    def images_per_s(self, batch: int, num_batches: int, with_gradient: bool) -> float:
        """Return images per second of all processes, num_batches in each. with_gradient: also backward."""
        task = (batch, self._size_px, num_batches, with_gradient)
        seconds = self._pool.starmap(_loop, [task] * self._num_processes, chunksize=1)
        return self._num_processes * batch * num_batches / max(seconds)


@contextmanager
def bare_model(folder: Path, num_processes: int, size_px: int) -> Iterator[BareModel]:
    with get_context("spawn").Pool(num_processes, _load, (folder,)) as pool:
        yield BareModel(pool, num_processes, size_px)


def _load(folder: Path) -> None:
    global _clip
    # Ctrl-C is for the parent: ended while it holds the pool's lock, a process would make the parent wait forever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def _loop(batch: int, size_px: int, num_batches: int, with_gradient: bool) -> float:
    """Return the seconds of num_batches, after one batch that fills the caches."""
    pixels = torch.rand(batch, 3, size_px, size_px, requires_grad=with_gradient)
    _forward(pixels, with_gradient)
    start = time.perf_counter()
    for _ in range(num_batches):
        _forward(pixels, with_gradient)
    return time.perf_counter() - start


def _forward(pixels: torch.Tensor, with_gradient: bool) -> None:
    with torch.set_grad_enabled(with_gradient):
        embeds = _clip.get_image_features(pixel_values=pixels).pooler_output
    if with_gradient:
        torch.autograd.grad(embeds.sum(), pixels)
