"""One reward service with a tiny CLIP for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.types import ASGIApp

from reward_server.limits import Limits
from reward_server.models import ClipArgs
from reward_server.worker import Worker, WorkerArgs
from tests.serving import reward_app, serve_app
from tests.tiny_models import make_tiny_clip

MAX_BODY_BYTES = 1 << 20


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    return Worker({"tiny-clip": ClipArgs(kind="clip", path=str(folder))}, WorkerArgs())


@pytest.fixture(scope="session")
def app(worker: Worker) -> ASGIApp:
    return reward_app(worker, Limits(max_body_bytes=MAX_BODY_BYTES))


@pytest.fixture(scope="session")
def reward_url(app: ASGIApp) -> Iterator[str]:
    with serve_app(app) as url:
        yield url
