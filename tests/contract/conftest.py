"""One reward service with a tiny CLIP for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.types import ASGIApp

from reward_server.models import ClipArgs
from reward_server.scorer import Scorer
from tests.serving import reward_app, serve_app
from tests.tiny_models import make_tiny_clip

MAX_BODY_BYTES = 1 << 20


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    return Scorer({"tiny-clip": ClipArgs(kind="clip", path=str(folder))})


@pytest.fixture(scope="session")
def app(scorer: Scorer) -> ASGIApp:
    return reward_app(scorer, MAX_BODY_BYTES)


@pytest.fixture(scope="session")
def reward_url(app: ASGIApp) -> Iterator[str]:
    with serve_app(app) as url:
        yield url
