"""Write checkpoints behind the training: each worker its part, in a thread; worker 0 completes them, removes old ones.

    writer = CheckpointWriter(store, rank=0, num_workers=2, attempt="a1b2c3")
    writer.write(engine.snapshot(), facts, best_step=None)   # the training goes on
    writer.settle(agree)                                     # before the next one, and at the end

A checkpoint that cannot be written costs the training nothing but a line: the one before stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from services.clients.checkpoint_store import CheckpointError, CheckpointStore, Manifest, Place

_POLL_S = 0.1


class Part(Protocol):
    """One worker's part of the training's state, as Engine.snapshot returns it."""

    def save(self, path: Path) -> None:
        """Write it to a file."""


class CheckpointWriter:
    """Writes one checkpoint at a time. `attempt`: a word that no other attempt at this run has, the same on all."""

    def __init__(self, store: CheckpointStore, rank: int, num_workers: int, attempt: str, num_kept: int) -> None:
        self._store, self._rank, self._num_workers, self._attempt = store, rank, num_workers, attempt
        self._num_kept = num_kept
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint")
        self._part: Future[bool] | None = None
        self._whole: Future[None] | None = None
        self._given_up = Event()

    def write(self, part: Part | None, facts: Mapping[str, Any], best_step: int | None) -> None:
        """Begin a checkpoint. Without a `part` it holds facts alone: the base model's, which nothing has changed.

        Call `settle` between two. best_step: the checkpoint that outlives newer ones.
        """
        place = self._store.place(facts["step"], self._attempt)
        self._given_up.clear()
        self._part = self._pool.submit(self._write_part, place, part, facts["step"])
        if self._rank == 0:
            num_parts = self._num_workers if part is not None else 0
            self._whole = self._pool.submit(self._complete, place, facts, num_parts, best_step)

    def settle(self, agree: Callable[[bool], bool]) -> None:
        """Wait until the last checkpoint is complete or given up. All workers call this together.

        `agree` returns whether its argument is true on all workers.
        """
        is_written = self._part.result() if self._part is not None else True
        if not agree(is_written):
            self._given_up.set()
        if self._whole is not None:
            self._whole.result()
        self._part = self._whole = None

    def write_alone(self, part: Part, facts: Mapping[str, Any], best_step: int | None, timeout_s: float) -> None:
        """Write and wait, in any thread, without the other workers' agreement: they do the same at about this time."""
        place = self._store.place(facts["step"], f"{self._attempt}s")
        if self._write_part(place, part, facts["step"]) and self._rank == 0:
            self._complete(place, facts, self._num_workers, best_step, timeout_s)

    def _write_part(self, place: Place, part: Part | None, step: int) -> bool:
        if part is None:
            return True
        try:
            with place.written(f"policy_{self._rank}.safetensors", self._rank) as path:
                part.save(path)
        except CheckpointError as error:
            print(f"warning: worker {self._rank}: no checkpoint of step {step}: {error}; training goes on", flush=True)
            return False
        return True

    def _complete(
        self,
        place: Place,
        facts: Mapping[str, Any],
        num_parts: int,
        best_step: int | None,
        timeout_s: float | None = None,
    ) -> None:
        """Wait for all parts, make the checkpoint one, and remove those that it replaces."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not place.is_whole(num_parts):
                if self._given_up.wait(_POLL_S) or (deadline is not None and time.monotonic() > deadline):
                    place.abandon()
                    return
            place.complete(facts, num_parts)
            for old in replaced(self._store.manifests(), self._num_kept, best_step):
                self._store.remove(old)
        except CheckpointError as error:
            place.abandon()
            print(f"warning: no checkpoint of step {facts['step']}: {error}; training goes on", flush=True)


def replaced(manifests: list[Manifest], num_kept: int, best_step: int | None) -> list[Manifest]:
    """Return which of the checkpoints, in the order of their steps, need not be kept.

    Kept are those of the newest `num_kept` steps and of the best one; of each the one that was written last.
    """
    last_of_step = {each.step: each for each in manifests}
    steps = {*sorted(last_of_step)[-num_kept:], *([] if best_step is None else [best_step])}
    kept = [last_of_step[step] for step in steps if step in last_of_step]
    return [each for each in manifests if each not in kept]
