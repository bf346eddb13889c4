"""Over HTTP a device that lacks memory is 503 with Retry-After, which the training's client obeys."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.clients.reward import RewardClient
from services.contract import MEDIA_TYPE, REWARDS_PATH
from tests.contract.conftest import LIMITS, REQUEST
from tests.serving import reward_app, serve_app


def test_it_is_503_with_retry_after_and_passes(clip: ClipArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.scoring.out_of_memory._RETRY_AFTER_S", 1)
    worker = Worker({"tiny-clip": clip}, WorkerArgs())
    num_failures_left = 2  # of a request of two images: both together, and the first alone

    def fail_at_first(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal num_failures_left
        num_failures_left -= 1
        if num_failures_left >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model: Any = worker._scorer.rewards["tiny-clip"].model
    hook = model._model.vision_model.encoder.layers[0].register_forward_hook(fail_at_first)
    with serve_app(reward_app(worker, LIMITS)) as url:
        headers = {"content-type": MEDIA_TYPE}
        refused = httpx.post(f"{url}{REWARDS_PATH}", content=REQUEST.to_bytes(), headers=headers, timeout=30)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "no memory for 1 images of 30 x 40 pixels for reward 'tiny-clip'" in refused.json()["error"]
        num_failures_left = 2
        with RewardClient(url, timeout_s=30) as client:
            tried_again = client.score(REQUEST)
            hook.remove()
            np.testing.assert_allclose(tried_again.rewards, client.score(REQUEST).rewards, atol=1e-6)
    assert num_failures_left < 0
