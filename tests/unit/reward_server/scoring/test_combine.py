"""A combined reward is the weighted sum of its rewards, its gradient likewise; a sum must be finite to be answered."""

from __future__ import annotations

import numpy as np
import pytest

from reward_server.scoring.combine import combine
from services.contract import ContractError, Images, PromptPair, RewardRequest, RewardResponse, WeightedReward

BATCH, SHAPE = 2, (3, 4, 6)


def make_request(*weights: float, gradient_dtype: str = "float32", is_stacked: bool = True) -> RewardRequest:
    images = np.zeros((BATCH, *SHAPE), np.float32)
    pairs = (PromptPair("cat", "3D", "Flat"),) * BATCH
    rewards = tuple(WeightedReward(f"reward-{index}", weight) for index, weight in enumerate(weights))
    layout: Images = images if is_stacked else tuple(images)
    return RewardRequest(layout, pairs, (0.1,) * BATCH, rewards, gradient_dtype=gradient_dtype)


def make_response(seed: int, is_stacked: bool = True, scale: float = 1.0) -> RewardResponse:
    random = np.random.default_rng(seed)
    gradient = scale * random.random((BATCH, *SHAPE), dtype=np.float32)
    rewards, positive, negative = random.random((3, BATCH), dtype=np.float32)
    layout: Images = gradient if is_stacked else tuple(gradient)
    return RewardResponse(rewards, positive[None], negative[None], layout, (f"reward-{seed}@sha256:0",), "id")


@pytest.mark.parametrize("is_stacked", [True, False])
def test_rewards_and_gradients_are_weighted_sums(is_stacked: bool) -> None:
    parts = [make_response(seed, is_stacked) for seed in range(3)]
    answer = combine(make_request(2.0, -0.5, 1.0, is_stacked=is_stacked), parts)
    expected = 2 * parts[0].rewards - 0.5 * parts[1].rewards + parts[2].rewards
    np.testing.assert_allclose(answer.rewards, expected, rtol=1e-6)
    gradients = [np.asarray(part.image_gradient) for part in parts]
    assert answer.image_gradient is not None
    expected_gradient = 2 * gradients[0] - 0.5 * gradients[1] + gradients[2]
    np.testing.assert_allclose(np.asarray(answer.image_gradient), expected_gradient, rtol=1e-5, atol=1e-6)
    assert isinstance(answer.image_gradient, np.ndarray) == is_stacked
    assert answer.positive_similarities.shape == (3, BATCH)
    assert answer.scorers == tuple(part.scorers[0] for part in parts)


def test_one_reward_of_weight_one_is_answered_without_a_copy() -> None:
    part = make_response(0)
    assert combine(make_request(1.0), [part]).image_gradient is part.image_gradient


def test_the_gradient_comes_in_the_dtype_asked_for() -> None:
    answer = combine(make_request(1.0, gradient_dtype="float16"), [make_response(0)])
    assert isinstance(answer.image_gradient, np.ndarray)
    assert answer.image_gradient.dtype == np.float16


def test_a_gradient_too_large_for_float16_is_an_error() -> None:
    with pytest.raises(ContractError, match=r"images\[0\] has no finite image_gradient in float16"):
        combine(make_request(1.0, gradient_dtype="float16"), [make_response(0, scale=1e6)])


def test_a_sum_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ContractError, match=r"images\[\d\] has no finite reward"):
        combine(make_request(3e38, 3e38), [make_response(0), make_response(1)])
