"""A batch of many callers gives each what it would have got alone; a caller's mistake stays its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_server.metrics import BATCH_IMAGES, PHASE_SECONDS, TEXT_CACHE_HITS, TEXT_CACHE_MISSES, Metric
from reward_server.models import ClipArgs
from reward_server.scoring.scorer import Answer, Job, Scorer, one_ahead
from services.contract import ContractError, PromptPair, RewardRequest, RewardResponse, WeightedReward
from tests.tiny_models import make_tiny_clip

TINY = (WeightedReward("tiny-clip"),)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipArgs:
    return ClipArgs(kind="clip", path=str(make_tiny_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture(scope="module")
def scorer(clip: ClipArgs) -> Scorer:
    return Scorer({"tiny-clip": clip})


def make_request(
    batch: int, size_px: int = 32, seed: int = 0, with_gradient: bool = True, prompt: str = "cat"
) -> RewardRequest:
    images = np.random.default_rng(seed).random((batch, 3, size_px, size_px), dtype=np.float32)
    pairs = tuple(PromptPair(f"{prompt} {index}", "3D", "Flat") for index in range(batch))
    return RewardRequest(images, pairs, tuple(0.1 * index for index in range(batch)), TINY, with_gradient)


def mixed(request: RewardRequest, *sizes_px: tuple[int, int]) -> RewardRequest:
    random = np.random.default_rng(7)
    return replace(request, images=tuple(random.random((3, *size), dtype=np.float32) for size in sizes_px))


def job(request: RewardRequest, request_id: str = "1") -> Job:
    return Job(request, "tiny-clip", request_id)


def answered(answer: Answer) -> RewardResponse:
    assert isinstance(answer, RewardResponse), answer
    return answer


def score_alone(scorer: Scorer, request: RewardRequest) -> RewardResponse:
    (answer,) = scorer.score([job(request, "alone")])
    return answered(answer)


def assert_same(one: RewardResponse, other: RewardResponse) -> None:
    np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-6)
    np.testing.assert_allclose(one.positive_similarities, other.positive_similarities, atol=1e-6)
    np.testing.assert_allclose(one.negative_similarities, other.negative_similarities, atol=1e-6)
    assert (one.image_gradient is None) == (other.image_gradient is None)
    if one.image_gradient is not None and other.image_gradient is not None:
        for left, right in zip(one.image_gradient, other.image_gradient, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-6)


CROWD = [
    make_request(3, seed=1),
    make_request(2, size_px=40, seed=2),
    make_request(1, seed=3, prompt="dog"),
    make_request(2, seed=4, with_gradient=False),
    make_request(5, seed=5),
    mixed(make_request(4, prompt="owl"), (32, 32), (40, 40), (48, 33), (32, 32)),
]


@pytest.mark.parametrize("max_batch_images", [1, 2, 64])
def test_everyone_gets_what_they_would_have_got_alone(clip: ClipArgs, scorer: Scorer, max_batch_images: int) -> None:
    crowded = Scorer({"tiny-clip": clip}, max_batch_images=max_batch_images)
    answers = crowded.score([job(request, str(index)) for index, request in enumerate(CROWD)])
    for index, (request, answer) in enumerate(zip(CROWD, map(answered, answers), strict=True)):
        assert answer.request_id == str(index)
        assert_same(answer, score_alone(scorer, request))


def test_images_of_mixed_sizes_get_what_each_gets_alone(scorer: Scorer) -> None:
    request = CROWD[-1]
    together = score_alone(scorer, request)
    assert isinstance(together.image_gradient, tuple)
    for index, image in enumerate(request.images):
        pair, scale = request.pairs[index : index + 1], request.preference_scales[index : index + 1]
        alone = score_alone(scorer, replace(request, images=image[None], pairs=pair, preference_scales=scale))
        np.testing.assert_allclose(together.rewards[index], alone.rewards[0], atol=1e-6)
        assert alone.image_gradient is not None
        assert together.image_gradient[index].shape == image.shape
        np.testing.assert_allclose(together.image_gradient[index], alone.image_gradient[0], atol=1e-6)


def test_bytes_mean_what_their_255th_part_means(scorer: Scorer) -> None:
    request = make_request(2)
    pixels = (np.asarray(request.images) * 255).round().astype(np.uint8)
    as_bytes = replace(request, images=pixels)
    as_floats = replace(request, images=pixels.astype(np.float32) / 255)
    assert_same(score_alone(scorer, as_bytes), score_alone(scorer, as_floats))


def test_callers_share_a_forward_whatever_their_dtype(clip: ClipArgs) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []

    def record(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        seen.append((metric.name, value, dict(labels)))

    scorer = Scorer({"tiny-clip": clip}, record=record)
    request = make_request(2)
    as_bytes = replace(request, images=np.zeros((2, 3, 32, 32), np.uint8))
    scorer.score([job(request), job(as_bytes)])
    labels = {"reward": "tiny-clip"}
    assert [each for each in seen if each[0] == BATCH_IMAGES.name] == [(BATCH_IMAGES.name, 4, labels)]
    assert (TEXT_CACHE_MISSES.name, 4, labels) in seen
    assert (TEXT_CACHE_HITS.name, 4, labels) in seen  # the second caller's


def test_bytes_without_a_gradient_do_not_depend_on_who_else_asks(scorer: Scorer) -> None:
    """They are resized as bytes: beside floats too, and alike under every layout in memory."""
    floats = make_request(2, size_px=72, with_gradient=False)
    pixels = (np.asarray(floats.images) * 255).round().astype(np.uint8)
    as_bytes = replace(floats, images=pixels)
    by_row = replace(floats, images=np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    together = [answered(each) for each in scorer.score([job(each) for each in (floats, as_bytes, by_row)])]
    for request, answer in zip((floats, as_bytes, as_bytes), together, strict=True):
        assert_same(answer, score_alone(scorer, request))
    np.testing.assert_allclose(together[0].rewards, together[1].rewards, atol=0.01)  # but for rounding


def bytes_of(*sizes_px: tuple[int, int]) -> RewardRequest:
    """Pictures of these sizes, to be scored without a gradient."""
    random = np.random.default_rng(11)
    images = tuple(random.integers(0, 256, (3, *size), dtype=np.uint8) for size in sizes_px)
    return replace(make_request(len(sizes_px), with_gradient=False), images=images)


def test_bytes_shrunk_before_are_scored_the_same_and_share_a_forward_whatever_their_size(clip: ClipArgs) -> None:
    sizes: list[float] = []

    def record(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric is BATCH_IMAGES:
            sizes.append(value)

    scorer = Scorer({"tiny-clip": clip}, record=record)
    asked = job(bytes_of((72, 72), (40, 90), (90, 40), (28, 28)))
    assert scorer.bytes_to_shrink(asked)
    (whole,), (shrunk,) = scorer.score([asked]), scorer.score([scorer.shrunk(asked)])
    assert_same(answered(shrunk), answered(whole))
    assert sizes == [1, 1, 1, 1, 4]
    stack = job(replace(bytes_of((72, 72), (72, 72)), images=np.stack(list(bytes_of((72, 72), (72, 72)).images))))
    assert scorer.shrunk(stack).request.images[0].shape == (3, 32, 32)
    assert_same(*(answered(each) for each in scorer.score([stack, scorer.shrunk(stack)])))


def test_what_is_differentiated_or_cropped_or_no_bytes_stays_whole(clip: ClipArgs, scorer: Scorer) -> None:
    picture = bytes_of((72, 72))
    for request in (replace(picture, with_gradient=True), make_request(1, with_gradient=False)):
        assert not scorer.bytes_to_shrink(job(request))
    assert not scorer.bytes_to_shrink(Job(picture, "beauty", "1"))
    cropping = Scorer({"tiny-clip": clip.model_copy(update={"crops": 2})})
    assert cropping.shrunk(job(picture)).request.images[0].shape == (3, 72, 72)


def test_one_callers_mistake_is_not_the_others(scorer: Scorer) -> None:
    good = make_request(2)
    wordy = replace(good, pairs=(good.pairs[0], PromptPair("word " * 50, "3D", "Flat")))
    answers = scorer.score([Job(good, "beauty", "0"), job(good), job(wordy)])
    assert isinstance(answers[0], ContractError)
    assert "'beauty' is not served here; served: tiny-clip" in str(answers[0])
    assert_same(answered(answers[1]), score_alone(scorer, good))
    assert isinstance(answers[2], ContractError)
    assert "word word" in str(answers[2])


def test_a_full_text_cache_forgets_but_does_not_err(clip: ClipArgs, scorer: Scorer) -> None:
    forgetful = Scorer({"tiny-clip": clip}, num_cached_texts=2)
    for seed in range(3):
        request = make_request(4, seed=seed, prompt=f"prompt {seed}")
        assert_same(score_alone(forgetful, request), score_alone(scorer, request))


def test_a_reward_that_is_not_finite_is_an_error_naming_the_image(tmp_path: Path) -> None:
    folder = make_tiny_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken = Scorer({"tiny-clip": ClipArgs(kind="clip", path=str(folder))})
    for request in (make_request(2), mixed(make_request(2), (32, 32), (40, 40))):
        (answer,) = broken.score([job(request)])
        assert isinstance(answer, ContractError)
        assert "images[0] has no finite tiny-clip reward" in str(answer)


def test_the_answer_names_reward_and_weights(scorer: Scorer) -> None:
    (name,) = score_alone(scorer, make_request(1)).scorers
    assert name == f"tiny-clip@{scorer.rewards['tiny-clip'].model.checksum}"


def test_crops_count_as_images_of_a_forward_and_are_part_of_the_version(clip: ClipArgs) -> None:
    sizes: list[float] = []

    def record(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric is BATCH_IMAGES:
            sizes.append(value)

    args = clip.model_copy(update={"crops": 3})
    roomy, tight = (Scorer({"tiny-clip": args}, size, record=record) for size in (64, 8))
    request = make_request(5, size_px=72)
    assert_same(score_alone(roomy, request), score_alone(tight, request))
    assert sizes == [5, 2, 2, 1]
    score_alone(Scorer({"tiny-clip": args}, max_batch_images=1, record=record), make_request(2, size_px=72))
    assert sizes[4:] == [1, 1]
    (name,) = score_alone(roomy, request).scorers
    assert name == f"tiny-clip@{roomy.rewards['tiny-clip'].model.checksum}+crops=3"


def test_forwards_and_backwards_are_timed_apart_and_each_within_the_whole(clip: ClipArgs) -> None:
    phases: list[tuple[str, float]] = []

    def record(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric is PHASE_SECONDS:
            phases.append((labels["phase"], value))

    scorer = Scorer({"tiny-clip": clip}, max_batch_images=2, record=record)
    start = time.perf_counter()
    scorer.score([job(make_request(3)), job(make_request(1, with_gradient=False))])
    assert [name for name, _ in phases] == ["forward", "backward", "forward", "backward", "forward"]
    assert all(seconds > 0 for _, seconds in phases)
    assert sum(seconds for _, seconds in phases) < time.perf_counter() - start


def test_the_next_forward_is_asked_for_before_the_last_one_is_waited_for() -> None:
    log: list[str] = []

    def start(name: str) -> Callable[[], str]:
        log.append(f"start {name}")
        return lambda: log.append(f"wait {name}") or name  # type: ignore[func-returns-value]

    assert list(one_ahead(start(name) for name in "abc")) == ["a", "b", "c"]
    assert log == ["start a", "start b", "wait a", "start c", "wait b", "wait c"]
    assert list(one_ahead(start(name) for name in "")) == []
