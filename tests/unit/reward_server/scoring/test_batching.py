"""What waits while the model is busy is its next batch; the queue is bounded; nobody's failure is another's."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from reward_server.scoring.batching import Batcher, Overloaded


@dataclass(frozen=True)
class Images:
    name: str
    num_images: int = 1


class Model:
    """Scores a batch when the test says so, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.is_free = asyncio.Event()

    async def __call__(self, jobs: Sequence[Images]) -> list[str]:
        self.batches.append([job.name for job in jobs])
        await self.is_free.wait()
        if any(job.name == "broken" for job in jobs):
            raise RuntimeError("out of memory")
        return [f"answer to {job.name}" for job in jobs]


async def submit(batcher: Batcher[Images, str], *jobs: Images) -> list[asyncio.Task[str]]:
    """The jobs on their way, each having reached the batcher."""
    tasks = [asyncio.create_task(batcher.submit(job)) for job in jobs]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_a_lone_caller_does_not_wait_for_company() -> None:
    async def run() -> None:
        model = Model()
        model.is_free.set()
        assert await Batcher(model, 8, 8).submit(Images("a")) == "answer to a"

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_what_waits_while_the_model_is_busy_is_the_next_batch() -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, max_batch_images=8, max_queued_images=100)
        first = await submit(batcher, Images("first"))
        others = await submit(batcher, Images("a", 4), Images("b", 4), Images("c", 1), Images("huge", 20))
        model.is_free.set()
        answers = await asyncio.gather(*first, *others)
        assert answers == [f"answer to {name}" for name in ("first", "a", "b", "c", "huge")]
        assert model.batches == [["first"], ["a", "b"], ["c"], ["huge"]]

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_a_batch_is_no_larger_than_the_last_one_s_speed_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    async def run() -> None:
        sizes: list[int] = []

        async def score(jobs: Sequence[Images]) -> list[str]:
            nonlocal now
            sizes.append(sum(job.num_images for job in jobs))
            await asyncio.sleep(0.01)  # in which the others arrive
            now += 0.02 * sizes[-1]
            return [job.name for job in jobs]

        batcher = Batcher(score, max_batch_images=64, max_queued_images=100, max_batch_s=0.1)
        first = await submit(batcher, Images("first", 4))  # nothing is known yet
        others = await submit(batcher, *(Images(str(index), 2) for index in range(4)), Images("huge", 9))
        await asyncio.gather(*first, *others)
        assert sizes == [4, 4, 4, 9]  # 0.1 s are 4 images of 0.02 s and a bit; a job is never split
        unhurried = Batcher(score, max_batch_images=64, max_queued_images=100, max_batch_s=None)
        first = await submit(unhurried, Images("first", 4))
        others = await submit(unhurried, *(Images(str(index), 2) for index in range(4)))
        await asyncio.gather(*first, *others)
        assert sizes[4:] == [4, 8]

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, max_batch_images=4, max_queued_images=4)
        running = await submit(batcher, Images("running"))
        waiting = await submit(batcher, Images("huge", 9))  # more than the queue holds, but nothing else waits
        with pytest.raises(Overloaded) as refusal:
            await batcher.submit(Images("too much"))
        assert refusal.value.retry_after_s >= 1
        model.is_free.set()
        await asyncio.gather(*running, *waiting)
        assert await batcher.submit(Images("later")) == "answer to later"

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_a_batch_that_fails_does_not_fail_the_next() -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, 1, 100)
        tasks = await submit(batcher, Images("broken"), Images("whole"))
        model.is_free.set()
        broken, whole = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(broken, RuntimeError)
        assert whole == "answer to whole"

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_in_a_batch_that_fails_only_who_is_at_fault_fails() -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, 100, 100)
        first = await submit(batcher, Images("first"))
        others = await submit(batcher, Images("a"), Images("broken"), Images("gone"), Images("b"))
        others[2].cancel()
        model.is_free.set()
        answers = await asyncio.gather(*first, *others, return_exceptions=True)
        assert [answers[index] for index in (0, 1, 4)] == ["answer to first", "answer to a", "answer to b"]
        assert isinstance(answers[2], RuntimeError)
        assert model.batches == [["first"], ["a", "broken", "b"], ["a"], ["broken"], ["b"]]

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_who_has_gone_is_not_scored() -> None:
    async def run() -> None:
        model = Model()
        batcher = Batcher(model, 1, 100)
        running, gone, patient = await submit(batcher, Images("running"), Images("gone"), Images("patient"))
        gone.cancel()
        model.is_free.set()
        await asyncio.gather(running, patient)
        assert model.batches == [["running"], ["patient"]]

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_a_refusal_survives_the_way_between_replicas() -> None:
    copy = pickle.loads(pickle.dumps(Overloaded("9 images wait already", 3)))
    assert (copy.retry_after_s, str(copy)) == (3, "9 images wait already; try again in 3 s")
