"""Cut requests into parts that may share a forward, and forwards into chunks of as many images as fit.

parts_of(0, request, prepared)       # images of one size and dtype each
chunks_of(group, max_images=64)      # of parts of one size, whoever sent them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reward_server.models.preprocess import as_float
from reward_server.models.transfer import joined, to_device
from reward_server.scoring.loaded_reward import Prepared
from services.contract import RewardRequest

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Images of one job that have one size and dtype; `first` is the index of the first one in the job."""

    job: int
    first: int
    images: NDArray[Any]  # (batch, 3, height, width)
    prepared: Sequence[Prepared]
    preference_scales: Sequence[float]

    def cut(self, start: int, end: int) -> Part:
        rows = slice(start, end)
        return replace(
            self,
            images=self.images[rows],
            prepared=self.prepared[rows],
            preference_scales=self.preference_scales[rows],
        )


def parts_of(index: int, request: RewardRequest, prepared: Sequence[Prepared]) -> list[Part]:
    """Part a request: stacked images stay together, images of mixed sizes are one part each."""
    if isinstance(request.images, np.ndarray):
        return [Part(index, 0, request.images, prepared, request.preference_scales)]
    return [
        Part(index, first, image[None], prepared[first : first + 1], request.preference_scales[first : first + 1])
        for first, image in enumerate(request.images)
    ]


def chunks_of(group: list[Part], max_images: int) -> Iterator[list[Part]]:
    """Yield the group's images in order, max_images at a time."""
    chunk: list[Part] = []
    free = max_images
    for part in group:
        start = 0
        while start < len(part.images):
            chunk.append(part.cut(start, start + free))
            start += len(chunk[-1].images)
            free -= len(chunk[-1].images)
            if free == 0:
                yield chunk
                chunk, free = [], max_images
    if chunk:
        yield chunk


def as_images(stacks: Sequence[NDArray[Any]], device: torch.device, stay_bytes: bool) -> Tensor:
    """Join stacks as float32 in [0, 1] on the device, or as bytes on the CPU if all are and may stay bytes.

    They are joined before they become floats: bytes are the least to copy.
    """
    if stay_bytes and stacks[0].dtype == np.uint8:
        return joined(stacks, CPU)  # they are the only ones: bytes and floats were grouped apart
    by_dtype = [joined(list(group), device) for _, group in groupby(stacks, key=lambda stack: stack.dtype)]
    return cat([as_float(to_device(tensor, device)).to(torch.float32) for tensor in by_dtype])


def cat(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors; a single one, which may be large, is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
