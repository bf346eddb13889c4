"""One reward service with a tiny CLIP for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from starlette.types import ASGIApp

from reward_server.http.limits import Limits
from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.contract import PromptPair, RewardRequest, WeightedReward
from tests.serving import reward_app, serve_app
from tests.tiny_models import make_tiny_clip

# Small enough that a test reaches each of them; the rate is out of reach.
LIMITS = Limits(
    max_body_bytes=1 << 20,
    max_images=8,
    max_pixels_per_image=20_000,
    max_pixels_per_request=30_000,
    max_text_chars=1000,
    requests_per_s=1e6,
    request_burst=1_000_000,
    max_stored_answer_bytes=1 << 18,
)
REQUEST = RewardRequest(
    images=np.random.default_rng(0).random((2, 3, 40, 30), dtype=np.float32),
    pairs=(PromptPair("cat", "3D", "Flat"), PromptPair("dog", "Photo", "Oil")),
    preference_scales=(0.0, 0.3),
    rewards=(WeightedReward("tiny-clip"),),
)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipArgs:
    return ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="session")
def worker(clip: ClipArgs) -> Worker:
    return Worker({"tiny-clip": clip}, WorkerArgs())


@pytest.fixture(scope="session")
def app(worker: Worker) -> ASGIApp:
    return reward_app(worker, LIMITS)


@pytest.fixture(scope="session")
def reward_url(app: ASGIApp) -> Iterator[str]:
    with serve_app(app) as url:
        yield url
