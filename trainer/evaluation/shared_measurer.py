"""Draw and measure a set of pictures on all workers: each measures what it has drawn, and worker 0 gets all of it.

A worker's share is every world_size-th picture, in chunks of PictureSet.batch. After each chunk worker 0 gathers
images, values and features. So a worker waits in a collective only for what others take longer for a chunk than itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.drawing import Draw, PictureSet
from trainer.evaluation.kept_chunks import read_rows
from trainer.evaluation.measurements import Measurements, Measurer


class SharedMeasurer:
    """Measures the pictures that policies draw of one set. All workers make one and call `measure` together.

    base_path: the file that gets the base model's images as its tensor "images"; a resumed run reads its share of them.
    """

    def __init__(self, pictures: PictureSet, measurer: Measurer, base_path: Path) -> None:
        self._pictures, self._measurer, self._base_path = pictures, measurer, base_path
        self._base: list[Measurements] = []  # of each chunk of this worker's share; their values are not used
        self._has_reference = False

    def measure(self, draw: Draw, *, of_base: bool = False) -> Measurements | None:
        """Draw and measure all pictures. Return all rows on worker 0, in the set's order, None elsewhere.

        draw: gives the images of any indices; every worker calls it equally often. of_base: it draws with the base
        model, from whose images those of later calls will differ.
        """
        prompts = self._pictures.prompts
        self._share_reference()
        base = [] if of_base else self._base_of_share()
        own: list[Measurements] = []
        rows: list[int] = []
        parts: list[Measurements] = []
        for (drawn, kept), before in zip_longest(self._chunks, base):
            images = draw(drawn)[: len(kept)].cpu()
            if kept:
                own.append(self._measurer.measure(images, [prompts[row] for row in kept], before, prompts))
            for gathered in _gather(_packed(kept, own[-1]) if kept else None):
                rows += gathered[0]
                parts.append(Measurements(*gathered[1:]))
        if of_base:
            self._base = own
        return Measurements.join(parts, rows) if parts else None

    def summarize(self, measurements: Measurements) -> dict[str, float]:
        """Return the numbers of the whole set, on worker 0: see Measurer.summarize."""
        return self._measurer.summarize(measurements)

    @property
    def _chunks(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return, for each chunk of this worker's share, the indices to draw and those to keep: without the filling."""
        num_images, rank, world_size = len(self._pictures.prompts), dist.get_rank(), dist.get_world_size()
        drawn = self._pictures.chunks(self._pictures.shard(num_images, rank, world_size))
        kept = self._pictures.chunks(range(rank, num_images, world_size))
        return list(zip_longest(drawn, kept, fillvalue=()))

    def _base_of_share(self) -> list[Measurements]:
        """Return those of the base model for each chunk; a resumed run reads the images and looks at them again."""
        if not self._base:
            images = [read_rows(self._base_path, "images", kept) for _, kept in self._chunks if kept]
            self._base = [Measurements(each, {}, self._measurer.features(each)) for each in images]
        return self._base

    def _share_reference(self) -> None:
        """Have each worker look at its share of the folder of real pictures, once."""
        if self._has_reference:
            return
        sampling, rank, world_size = self._pictures.sampling, dist.get_rank(), dist.get_world_size()
        own = self._measurer.reference_chunks()[rank::world_size]
        size = sampling.height_px, sampling.width_px
        shares = _gather([self._measurer.reference_features(files, *size) for files in own])
        if features := [each for share in shares for each in share]:
            self._measurer.use_reference(features)
        self._has_reference = True


def _packed(rows: Sequence[int], part: Measurements) -> tuple[list[int], Tensor, dict[str, Tensor], Tensor]:
    return list(rows), part.images, part.values, part.features


def _gather(part: Any) -> list[Any]:
    """Return on worker 0 what all workers give, but for None; nothing elsewhere. Only tensors and plain types pass."""
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(part, parts, weights_only=True)
    return [each for each in parts or [] if each is not None]
