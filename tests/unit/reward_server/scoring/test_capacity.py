"""A reward takes as many images at once as fit into its device's memory and into the time that a batch may take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reward_server.metrics import ignore
from reward_server.models import ClipArgs
from reward_server.scoring.capacity import _climb, largest_batch
from reward_server.scoring.device_share import allowed_fraction
from reward_server.scoring.loaded_reward import LoadedReward
from reward_server.scoring.out_of_memory import OutOfMemory
from reward_server.scoring.worker import Worker, WorkerArgs
from tests.tiny_models import make_tiny_clip

GIB = 2**30


def linear(num_images: int) -> float:
    return 0.05 + 0.02 * num_images


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipArgs:
    return ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="module")
def reward(clip: ClipArgs) -> LoadedReward:
    return LoadedReward("tiny-clip", clip, 16, ignore)


@pytest.mark.parametrize(("fits", "largest"), [(1, 1), (5, 4), (8, 8), (100, 16)])
def test_memory_decides_by_trying(
    reward: LoadedReward, fits: int, largest: int, caplog: pytest.LogCaptureFixture
) -> None:
    hook = fail_above(reward, fits)
    with caplog.at_level(logging.INFO, "reward_server"):
        assert largest_batch(reward, image_px=40, max_images=20, max_seconds=None) == largest
    hook.remove()
    assert f"{largest} images of 40 px take" in caplog.text


def test_a_card_that_is_too_small_for_one_image_is_named(reward: LoadedReward) -> None:
    hook = fail_above(reward, 0)
    with pytest.raises(OutOfMemory, match="no memory for 1 images of 40 x 40 pixels for reward 'tiny-clip'"):
        largest_batch(reward, image_px=40, max_images=20, max_seconds=None)
    hook.remove()


def fail_above(reward: LoadedReward, max_images: int) -> Any:
    def fail_if_large(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs[0]) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model: Any = reward.model
    return model._model.vision_model.encoder.layers[0].register_forward_hook(fail_if_large)


@pytest.mark.parametrize(
    ("seconds_of", "max_seconds", "largest", "tried"),
    [
        (linear, None, 64, [1, 2, 4, 8, 16, 32, 64]),
        (linear, 1.0, 32, [1, 2, 4, 8, 16, 32]),
        (linear, 0.05, 1, [1]),
        (lambda num_images: 0.02 * num_images**2, 0.2, 2, [1, 2, 4]),
    ],
)
def test_time_decides_and_nothing_much_longer_is_tried(
    seconds_of: Callable[[int], float], max_seconds: float | None, largest: int, tried: list[int]
) -> None:
    seen: list[int] = []

    def seconds_for(num_images: int) -> float:
        seen.append(num_images)
        return seconds_of(num_images)

    assert _climb(seconds_for, 64, max_seconds)[0] == largest
    assert seen == tried


def test_auto_measures_when_the_worker_starts(clip: ClipArgs) -> None:
    args = WorkerArgs(max_batch_images="auto", auto_image_px=40, max_queued_images=4)
    assert Worker({"tiny-clip": clip}, args)._scorer.max_images == {"tiny-clip": 4}
    assert Worker({"tiny-clip": clip}, args.model_copy(update={"max_batch_s": 1e-9}))._scorer.max_images == {
        "tiny-clip": 1
    }


def test_the_share_of_a_card_leaves_room_for_cuda_s_own() -> None:
    assert allowed_fraction(0.5, 80 * GIB) == pytest.approx((40 - 0.6) / 80)
    with pytest.raises(ValueError, match=r"num_gpus 0.01 of a card of 24.0 GiB is not more than the 0.6 GiB"):
        allowed_fraction(0.01, 24 * GIB)
