"""Answers kept for their Idempotency-Key: computed once, forgotten in time, and never more bytes than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.responses import Response

from reward_server.http.idempotency import REPLAYED_HEADER, StoredAnswers
from reward_server.http.limits import Limits
from services.contract import ContractError

TTL_S = 10.0


class Computation:
    """Answers with `body`, counts how often, and can be held back."""

    def __init__(self, body: bytes = b"answer", fails_first: bool = False) -> None:
        self.body, self.fails_first = body, fails_first
        self.num_runs = 0
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self) -> Response:
        self.num_runs += 1
        await self.may_end.wait()
        if self.fails_first and self.num_runs == 1:
            raise RuntimeError("a fault that passes")
        return Response(self.body, media_type="text/plain")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run(test: Callable[[StoredAnswers, Clock], Awaitable[None]], max_bytes: int = 1 << 20) -> None:
    clock = Clock()

    async def main() -> None:
        await test(StoredAnswers(max_bytes, TTL_S, clock), clock)

    asyncio.run(main())


def test_a_second_request_gets_the_first_ones_answer_until_it_expires() -> None:
    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation()
        first = await answers.once("key", b"digest", compute)
        clock.now_s = TTL_S - 1
        again = await answers.once("key", b"digest", compute)
        assert (again.body, again.media_type, again.headers[REPLAYED_HEADER]) == (first.body, "text/plain", "true")
        assert REPLAYED_HEADER not in first.headers
        assert compute.num_runs == 1
        clock.now_s = TTL_S
        await answers.once("key", b"digest", compute)
        assert compute.num_runs == 2

    run(test)


def test_another_request_under_the_same_key_is_refused_also_while_the_first_runs() -> None:
    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation()
        compute.may_end.clear()
        first = asyncio.create_task(answers.once("key", b"one", compute))
        await asyncio.sleep(0)
        with pytest.raises(ContractError, match="another request"):
            await answers.once("key", b"two", compute)
        compute.may_end.set()
        await first
        with pytest.raises(ContractError, match="another request"):
            await answers.once("key", b"two", compute)
        await answers.once("other key", b"two", compute)
        assert compute.num_runs == 2

    run(test)


def test_requests_at_once_share_one_run() -> None:
    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation()
        compute.may_end.clear()
        tasks = [asyncio.create_task(answers.once("key", b"digest", compute)) for _ in range(5)]
        await asyncio.sleep(0)
        compute.may_end.set()
        assert {bytes(answer.body) for answer in await asyncio.gather(*tasks)} == {b"answer"}
        assert compute.num_runs == 1

    run(test)


def test_who_waited_for_a_run_that_failed_runs_it_again() -> None:
    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation(fails_first=True)
        first, second = await asyncio.gather(
            *(answers.once("key", b"digest", compute) for _ in range(2)), return_exceptions=True
        )
        assert isinstance(first, RuntimeError)
        assert isinstance(second, Response)
        assert compute.num_runs == 2

    run(test)


def test_the_bytes_kept_are_bounded_and_the_oldest_is_forgotten_first() -> None:
    max_bytes = 10_000

    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation(bytes(1000))
        for index in range(100):
            await answers.once(str(index), b"digest", compute)
            assert 0 < answers.num_bytes <= max_bytes
        await answers.once("99", b"digest", compute)
        assert compute.num_runs == 100
        await answers.once("0", b"digest", compute)
        assert compute.num_runs == 101
        too_large = Computation(bytes(max_bytes))
        for _ in range(2):
            await answers.once("large", b"digest", too_large)
        assert too_large.num_runs == 2

    run(test, max_bytes)


def test_by_default_the_answer_to_a_trainers_batch_is_kept() -> None:
    async def test(answers: StoredAnswers, clock: Clock) -> None:
        compute = Computation(bytes(8 * 3 * 512 * 512 * 4))  # a gradient in float32
        for _ in range(2):
            await answers.once("key", b"digest", compute)
        assert compute.num_runs == 1

    run(test, Limits().max_stored_answer_bytes)
