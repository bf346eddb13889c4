"""The seconds of a phase are those of its own work on the GPU, which goes on while Python is ahead."""

from __future__ import annotations

import time

import pytest
import torch

from tests.local_reward import LocalReward
from tests.unit.trainer.algorithm.test_reward_loss import PAIRS, SCALE, WORDS, images
from trainer.algorithm.image_draws import NOTHING_DRAWN
from trainer.algorithm.reward_loss import reward_images
from trainer.algorithm.step_metrics import StepMetrics

LEFT_S = 0.2  # what the GPU has yet to do


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of work that wait in a GPU's queue: whoever synchronizes waits for them."""
    queue: list[float] = []

    def work_off() -> None:
        time.sleep(sum(queue))
        queue.clear()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", work_off)
    return queue


def test_a_phase_has_the_work_that_it_queued_and_none_from_before(left: list[float]) -> None:
    metrics = StepMetrics()
    left.append(LEFT_S)
    with metrics.timed("later"):
        pass
    with metrics.timed("rollout"):
        left.append(LEFT_S)
    assert metrics.seconds["later"] < LEFT_S / 2
    assert metrics.seconds["rollout"] >= LEFT_S


def test_the_reward_is_not_charged_with_the_decoding_that_comes_before(left: list[float]) -> None:
    left.append(LEFT_S)
    rewarded = reward_images(images(), PAIRS, [WORDS], "srp", "denoise", [SCALE], NOTHING_DRAWN, LocalReward())
    assert not left, "it waited"
    assert rewarded.seconds < LEFT_S / 2
