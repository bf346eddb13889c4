"""JSON answers: probabilities are probabilities, orders agree with them, heat maps are of the gradient."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.http.answers import heat_map, preference_probabilities, rank_answer
from services.contract import Float32, RewardResponse

reward_lists = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8)
temperatures = st.floats(1e-6, 1e6)


def response_of(rewards: list[float]) -> RewardResponse:
    numbers = np.array(rewards, np.float32)
    return RewardResponse(numbers, numbers[None], 0 * numbers[None], None, ("clip@sha256:0",), "id-1")


@given(reward_lists, temperatures)
def test_of_two_pictures_one_is_preferred(rewards: list[float], temperature: float) -> None:
    probabilities = preference_probabilities(np.array(rewards, np.float32), temperature)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities + probabilities.T, 1, atol=1e-15)
    np.testing.assert_array_equal(probabilities.diagonal(), 0.5)


@given(reward_lists, temperatures)
def test_the_order_agrees_with_rewards_and_probabilities(rewards: list[float], temperature: float) -> None:
    answer = rank_answer(response_of(rewards), temperature)
    assert sorted(answer.order) == list(range(len(rewards)))
    for better, worse in zip(answer.order, answer.order[1:], strict=False):
        assert answer.rewards[better] >= answer.rewards[worse]
        assert answer.probabilities[better][worse] >= 0.5
        if answer.rewards[better] == answer.rewards[worse]:
            assert better < worse


def test_a_probability_is_the_logistic_of_the_difference() -> None:
    probabilities = preference_probabilities(np.array([1.0, 3.0], np.float32), 0.5)
    assert probabilities[0, 1] == pytest.approx(1 / (1 + np.exp(4)))


def decoded(values: str) -> Float32:
    return np.frombuffer(base64.b64decode(values), "<f4").reshape(4, 5)


def test_a_heat_map_is_norm_and_sum_over_the_colors() -> None:
    gradient = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    shown = heat_map(gradient)
    assert (shown.height_px, shown.width_px) == (4, 5)
    np.testing.assert_allclose(decoded(shown.values), np.sqrt((gradient**2).sum(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(decoded(shown.signed), gradient.sum(axis=0), atol=1e-6)
