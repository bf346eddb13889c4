"""A device that lacks memory costs time, then an answer to come back later; never the process or another's answer."""

from __future__ import annotations

import asyncio
import logging
import pickle
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reward_server.metrics import BATCH_IMAGES, OUT_OF_MEMORY, Metric
from reward_server.models import ClipArgs
from reward_server.scoring.batching import Overloaded
from reward_server.scoring.out_of_memory import OutOfMemory, short_of_memory
from reward_server.scoring.scorer import Answer, Job, Scorer
from reward_server.scoring.worker import Worker, WorkerArgs
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward
from tests.tiny_models import make_tiny_clip

CUDA_TEXT = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipArgs:
    return ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path_factory.mktemp("clip"))))


class Recorded:
    """The values of each metric, in order."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.values.setdefault(metric.name, []).append(value)


@contextmanager
def memory_for(scorer: Scorer, max_images: int, tower: str = "vision_model") -> Iterator[None]:
    """The real model, one of whose towers raises as torch does, in the middle of its forward, above a batch size."""

    def fail_if_large(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs[0]) > max_images:
            raise torch.OutOfMemoryError(CUDA_TEXT)

    model: Any = scorer.rewards["tiny-clip"].model
    hook = getattr(model._model, tower).encoder.layers[0].register_forward_hook(fail_if_large)
    try:
        yield
    finally:
        hook.remove()


def make_job(batch: int, seed: int = 0, size_px: int = 40) -> Job:
    images = np.random.default_rng(seed).random((batch, 3, size_px, 30), dtype=np.float32)
    pairs = tuple(PromptPair(f"cat {index}", "3D", "Flat") for index in range(batch))
    request = RewardRequest(images, pairs, tuple(0.1 * index for index in range(batch)), (WeightedReward("tiny-clip"),))
    return Job(request, "tiny-clip", str(seed))


def assert_same(one: Answer, other: Answer) -> None:
    assert isinstance(one, RewardResponse)
    assert isinstance(other, RewardResponse)
    np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-6)
    np.testing.assert_allclose(np.asarray(one.image_gradient), np.asarray(other.image_gradient), atol=1e-6)


def test_a_batch_too_large_for_the_device_is_scored_in_parts_and_answered_alike(
    clip: ClipArgs, caplog: pytest.LogCaptureFixture
) -> None:
    record = Recorded()
    scorer = Scorer({"tiny-clip": clip}, record=record)
    jobs = [make_job(5, seed=1), make_job(6, seed=2)]
    plenty = scorer.score(jobs)
    with memory_for(scorer, 3), caplog.at_level(logging.WARNING):
        scarce = scorer.score(jobs)
    for one, other in zip(plenty, scarce, strict=True):
        assert_same(one, other)
    assert record.values[BATCH_IMAGES.name] == [11, 3, 3, 3, 2]  # 11 fails, 6 and 5 fail, 3, 3, 3 and 2 are done
    assert sum(record.values[OUT_OF_MEMORY.name]) == 3
    assert "no memory for 11 images of 30 x 40 pixels for reward 'tiny-clip'; lower max_batch_images" in caplog.text


def test_who_asks_for_what_fits_is_answered_beside_who_asks_for_what_does_not(clip: ClipArgs) -> None:
    scorer = Scorer({"tiny-clip": clip})
    small, wordy = make_job(2, seed=1), make_job(1, seed=2)
    (expected,) = scorer.score([small])
    pairs = (PromptPair("a text that no cache holds", "3D", "Flat"),)
    wordy = replace(wordy, request=replace(wordy.request, pairs=pairs))
    with memory_for(scorer, 0, tower="text_model"):
        refused, answered = scorer.score([wordy, small])  # whose texts are cached
    assert isinstance(refused, OutOfMemory)
    assert "1 prompt pairs" in str(refused)
    assert_same(answered, expected)


def test_one_image_too_large_is_an_answer_to_come_back_and_the_process_goes_on(clip: ClipArgs) -> None:
    async def run() -> None:
        worker = Worker({"tiny-clip": clip}, WorkerArgs())
        with memory_for(worker._scorer, 0):
            both = await asyncio.gather(*(worker.score(make_job(2, seed)) for seed in (1, 2)), return_exceptions=True)
        for each in both:
            assert isinstance(each, Overloaded)
            assert each.retry_after_s >= 1
            assert "no memory for 1 images of 30 x 40 pixels" in str(each)
        assert isinstance(await worker.score(make_job(2, 1)), RewardResponse)

    asyncio.run(asyncio.wait_for(run(), timeout=60))


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError(CUDA_TEXT), False),
    ],
    ids=["lost", "short of memory"],
)
def test_a_process_that_lost_its_device_says_so_and_one_without_memory_does_not(
    clip: ClipArgs, error: RuntimeError, is_lost: bool
) -> None:
    async def run() -> None:
        worker = Worker({"tiny-clip": clip}, WorkerArgs())
        worker.check_health()

        def fail(module: Any, inputs: tuple[Any, ...]) -> None:
            raise error

        model: Any = worker._scorer.rewards["tiny-clip"].model
        model._model.vision_model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            await worker.score(make_job(1))
        if is_lost:
            with pytest.raises(RuntimeError, match=r"lost to this process.*illegal memory access"):
                worker.check_health()
        else:
            worker.check_health()

    asyncio.run(asyncio.wait_for(run(), timeout=60))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_TEXT),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_to_lack_memory_is_known_and_gives_back_what_the_work_held(error: RuntimeError) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise error

    with pytest.raises(OutOfMemory, match="no memory for this"):  # noqa: SIM117
        with short_of_memory("this"):
            work()
    assert held[0]() is None


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, short_of_memory("this"):
        raise error
    assert raised.value is error


def test_it_survives_the_way_between_replicas() -> None:
    copy = pickle.loads(pickle.dumps(OutOfMemory("the device has no memory for this", 5)))
    assert isinstance(copy, OutOfMemory)
    assert str(copy) == "the device has no memory for this; try again in 5 s"
