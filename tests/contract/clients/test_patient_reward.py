"""A training's reward client against a service that goes away: it waits, says so, beats, and ends in time."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import pytest
from starlette.types import ASGIApp

from deploy.settings import free_port
from services.clients.patient_reward import PatientRewardClient
from services.clients.reward import RewardRejected, RewardUnavailable, RewardUnreachable
from services.config.rewards import RewardServiceConfig
from services.contract import WeightedReward
from tests.contract.clients.test_reward import FailsFirst, status
from tests.contract.conftest import REQUEST
from tests.serving import serve_app

EVERY_S = 0.2


class Watched:
    """A patient client with what it told and how often it beat."""

    def __init__(self, url: str, patience_s: float, timeout_s: float = 5.0) -> None:
        service = RewardServiceConfig(url=url, patience_minutes=patience_s / 60, timeout_s=timeout_s)
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.num_beats = 0
        self.client = PatientRewardClient(service, beat=self._beat, tell=self.lines.put, remind_s=EVERY_S)

    def _beat(self) -> None:
        self.num_beats += 1

    def told(self) -> list[str]:
        return [self.lines.get() for _ in range(self.lines.qsize())]


@contextmanager
def frozen_service() -> Iterator[str]:
    """What a stopped process does: its connections open, and nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_service_that_comes_back_gets_the_request_and_the_outage_is_told(app: ASGIApp) -> None:
    port = free_port()
    watched = Watched(url := f"http://127.0.0.1:{port}", patience_s=60)
    with watched.client as client, ThreadPoolExecutor(1) as caller:
        with serve_app(app, port):
            before = client.score(REQUEST)
        assert watched.told() == []
        answer = caller.submit(client.score, REQUEST)
        first, second = watched.lines.get(timeout=30), watched.lines.get(timeout=30)
        with serve_app(app, port):
            assert answer.result(timeout=30).rewards == pytest.approx(before.rewards)
    assert first.startswith(f"reward service at {url} has not answered for 0 s (ConnectError: ")
    assert second.endswith("; the run waits up to 1 minutes (reward_service.patience_minutes)")
    assert watched.told()[-1].startswith(f"reward service at {url} answers again after ")
    assert watched.num_beats >= 3  # one answer, two attempts or more


def test_the_last_error_is_raised_when_patience_ends() -> None:
    watched = Watched(f"http://127.0.0.1:{free_port()}", patience_s=1.0)
    began = time.monotonic()
    with pytest.raises(RewardUnreachable, match="does not answer"):
        watched.client.score(REQUEST)
    assert time.monotonic() - began < 1.0 + EVERY_S
    assert 1 <= len(told := watched.told()) <= 5
    assert not any("again" in line for line in told)


def test_a_service_that_fails_for_long_gets_one_key_and_ends_unavailable(app: ASGIApp) -> None:
    failing = FailsFirst(app, [status(500)] * 100)
    with serve_app(failing) as url, pytest.raises(RewardUnavailable, match="answered 500"):
        Watched(url, patience_s=2.0).client.score(REQUEST)
    assert len(failing.idempotency_keys) >= 2
    assert len(set(failing.idempotency_keys)) == 1


def test_an_attempt_in_flight_holds_up_no_line() -> None:
    with frozen_service() as url:
        watched = Watched(url, patience_s=2.5, timeout_s=1.0)
        with pytest.raises(RewardUnreachable, match="ReadTimeout"):
            watched.client.score(REQUEST)
    assert watched.num_beats == 2  # at 0 s, and at 1.5 s or a little later; a third would come after 3.5 s
    assert 5 <= len(watched.told()) <= 10  # from the first failure at 1 s to the second at 2.5 s or a little later


def test_a_refused_request_ends_at_once(app: ASGIApp) -> None:
    with serve_app(app) as url:
        watched = Watched(url, patience_s=60)
        with pytest.raises(RewardRejected):
            watched.client.score(replace(REQUEST, rewards=(WeightedReward("absent"),)))
    assert watched.num_beats == 1
    assert watched.told() == []
