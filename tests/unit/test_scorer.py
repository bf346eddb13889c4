"""A batch of many callers gives each what it would have got alone; a caller's mistake stays its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_server.models import ClipArgs
from reward_server.scorer import Answer, Job, Scorer
from services.contract import ContractError, PromptPair, RewardRequest, RewardResponse
from tests.tiny_models import make_tiny_clip


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
    return RewardRequest("tiny-clip", images, pairs, tuple(0.1 * index for index in range(batch)), with_gradient)


def answered(answer: Answer) -> RewardResponse:
    assert isinstance(answer, RewardResponse), answer
    return answer


def score_alone(scorer: Scorer, request: RewardRequest) -> RewardResponse:
    (answer,) = scorer.score([Job(request, "alone")])
    return answered(answer)


MIXED = [
    make_request(3, seed=1),
    make_request(2, size_px=40, seed=2),
    make_request(1, seed=3, prompt="dog"),
    make_request(2, seed=4, with_gradient=False),
    make_request(5, seed=5),
]


@pytest.mark.parametrize("max_batch_images", [1, 2, 64])
def test_everyone_gets_what_they_would_have_got_alone(clip: ClipArgs, scorer: Scorer, max_batch_images: int) -> None:
    crowded = Scorer({"tiny-clip": clip}, max_batch_images=max_batch_images)
    answers = crowded.score([Job(request, str(index)) for index, request in enumerate(MIXED)])
    for index, (request, answer) in enumerate(zip(MIXED, map(answered, answers), strict=True)):
        alone = score_alone(scorer, request)
        assert answer.request_id == str(index)
        np.testing.assert_allclose(answer.rewards, alone.rewards, atol=1e-6)
        np.testing.assert_allclose(answer.positive_similarities, alone.positive_similarities, atol=1e-6)
        assert (answer.image_gradient is None) == (not request.with_gradient)
        if answer.image_gradient is not None and alone.image_gradient is not None:
            np.testing.assert_allclose(answer.image_gradient, alone.image_gradient, atol=1e-6)


def test_one_callers_mistake_is_not_the_others(scorer: Scorer) -> None:
    good = make_request(2)
    unknown = replace(good, reward="beauty")
    wordy = replace(good, pairs=(good.pairs[0], PromptPair("word " * 50, "3D", "Flat")))
    answers = scorer.score([Job(unknown, "0"), Job(good, "1"), Job(wordy, "2")])
    assert isinstance(answers[0], ContractError)
    assert "'beauty' is not served here; served: tiny-clip" in str(answers[0])
    np.testing.assert_allclose(answered(answers[1]).rewards, score_alone(scorer, good).rewards, atol=1e-6)
    assert isinstance(answers[2], ContractError)
    assert "word word" in str(answers[2])


def test_a_full_text_cache_forgets_but_does_not_err(clip: ClipArgs, scorer: Scorer) -> None:
    forgetful = Scorer({"tiny-clip": clip}, num_cached_texts=2)
    for seed in range(3):
        request = make_request(4, seed=seed, prompt=f"prompt {seed}")
        np.testing.assert_allclose(
            score_alone(forgetful, request).rewards, score_alone(scorer, request).rewards, atol=1e-6
        )


def test_a_reward_that_is_not_finite_is_an_error_naming_the_image(tmp_path: Path) -> None:
    folder = make_tiny_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken = Scorer({"tiny-clip": ClipArgs(kind="clip", path=str(folder))})
    (answer,) = broken.score([Job(make_request(2), "0")])
    assert isinstance(answer, ContractError)
    assert "images[0] has no finite tiny-clip reward" in str(answer)


def test_the_answer_names_reward_and_weights(scorer: Scorer) -> None:
    assert score_alone(scorer, make_request(1)).scorer == f"tiny-clip@{scorer.versions['tiny-clip']}"
