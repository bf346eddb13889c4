"""Batch requests over callers: what waits while the model is busy is the next batch. No timer; bounds in size and time.

    batcher = Batcher(score_batch, max_batch_images=64, max_queued_images=512)
    answer = await batcher.submit(job)       # raises Overloaded if too many images wait already

Imports neither torch nor ray; for use in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from reward_server.metrics import PHASE_SECONDS, QUEUED_IMAGES, Record, ignore

_MAX_RETRY_AFTER_S = 60
_log = logging.getLogger(__name__)


class Sized(Protocol):
    @property
    def num_images(self) -> int: ...


JobT = TypeVar("JobT", bound=Sized)
AnswerT = TypeVar("AnswerT")


class Overloaded(RuntimeError):
    """Too much waits already. `retry_after_s`: whole seconds until what waits now should be done."""

    def __init__(self, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(reason, retry_after_s)  # both, so that it survives pickling between replicas
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}; try again in {self.retry_after_s} s"


@dataclass(slots=True)
class _Waiting(Generic[JobT, AnswerT]):
    job: JobT
    answer: asyncio.Future[AnswerT]
    since: float


class Batcher(Generic[JobT, AnswerT]):
    """Runs `score_batch`, which returns one answer for each job in order, on one batch after another.

    max_batch_s: how long a batch should take at most, by the speed of the last one; so a caller waits no longer than
    that for the batch before, and as long for its own. A job is never split: a large one takes what it takes.
    """

    def __init__(
        self,
        score_batch: Callable[[Sequence[JobT]], Awaitable[Sequence[AnswerT]]],
        max_batch_images: int,
        max_queued_images: int,
        record: Record = ignore,
        max_batch_s: float | None = None,
    ) -> None:
        self._score_batch = score_batch
        self._max_batch_images = max_batch_images
        self._max_queued_images = max_queued_images
        self._max_batch_s = max_batch_s
        self._record = record
        self._queue: deque[_Waiting[JobT, AnswerT]] = deque()
        self._queued_images = 0
        self._seconds_per_image = 0.0  # of the last batch
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, job: JobT) -> AnswerT:
        """Return the job's answer. Raise Overloaded, or what score_batch raised for the job alone.

        A job larger than the whole queue is taken if nothing else waits; otherwise it could never be.
        """
        if self._queue and self._queued_images + job.num_images > self._max_queued_images:
            wait_s = math.ceil(self._queued_images * self._seconds_per_image)
            raise Overloaded(f"{self._queued_images} images wait already", min(max(wait_s, 1), _MAX_RETRY_AFTER_S))
        waiting = _Waiting[JobT, AnswerT](job, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._queue.append(waiting)
        self._count(job.num_images)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.answer

    async def _work(self) -> None:
        """Score one batch after another until nothing waits."""
        await asyncio.sleep(0)  # jobs submitted in the same turn of the loop join the batch
        while batch := self._next_batch():
            start = time.perf_counter()
            for each in batch:
                self._record(PHASE_SECONDS, start - each.since, {"phase": "wait"})
            await self._score(batch)

    async def _score(self, batch: list[_Waiting[JobT, AnswerT]]) -> None:
        """Answer the batch's jobs. If the batch fails, score each job alone, so that only the faulty one fails."""
        start = time.perf_counter()
        outcome = asyncio.ensure_future(self._score_batch([each.job for each in batch]))
        await asyncio.wait([outcome])
        error = outcome.exception()
        if error is None:
            self._seconds_per_image = (time.perf_counter() - start) / sum(each.job.num_images for each in batch)
            for each, answer in zip(batch, outcome.result(), strict=True):
                if not each.answer.done():  # its caller may have gone
                    each.answer.set_result(answer)
        elif len(batch) == 1:
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)
        else:
            _log.warning("a batch of %d requests failed and is run again one by one", len(batch), exc_info=error)
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and memory may be what was lacking
            for each in batch:
                if not each.answer.done():
                    await self._score([each])

    def _next_batch(self) -> list[_Waiting[JobT, AnswerT]]:
        """Take the jobs that waited longest, as many as fit and at least one; drop those whose callers have gone."""
        batch: list[_Waiting[JobT, AnswerT]] = []
        num_images, most = 0, self._most_images()
        while self._queue and (not batch or num_images + self._queue[0].job.num_images <= most):
            waiting = self._queue.popleft()
            self._count(-waiting.job.num_images)
            if not waiting.answer.done():
                batch.append(waiting)
                num_images += waiting.job.num_images
        return batch

    def _most_images(self) -> int:
        if self._max_batch_s is None or self._seconds_per_image == 0:
            return self._max_batch_images
        return min(self._max_batch_images, int(self._max_batch_s / self._seconds_per_image))

    def _count(self, num_images: int) -> None:
        self._queued_images += num_images
        self._record(QUEUED_IMAGES, self._queued_images, {})
