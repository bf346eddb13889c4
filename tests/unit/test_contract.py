"""The wire: what goes in comes out, its bytes do not change by accident, and nonsense is named, never executed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from services.contract import ContractError, PromptPair, RewardRequest, RewardResponse

GOLDEN = Path(__file__).parent.parent / "golden" / "reward_request.safetensors"
PAIR = PromptPair(prompt="grinning face", positive="3D", negative="Flat")
REQUEST = RewardRequest(
    reward="fluent-clip",
    images=np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2),
    pairs=(PAIR,),
    preference_scales=(0.25,),
)


def body_with(**fields: Any) -> bytes:
    """The bytes of REQUEST with some fields of its message replaced."""
    message = {
        "reward": "fluent-clip",
        "pairs": [{"prompt": "a", "positive": "b", "negative": "c"}],
        "preference_scales": [0.1],
        "with_gradient": True,
    } | fields
    return save({"images": REQUEST.images}, metadata={"message": json.dumps(message)})


def test_request_bytes_are_those_of_the_first_release() -> None:
    assert REQUEST.to_bytes() == GOLDEN.read_bytes()


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    text=st.text(min_size=1).filter(str.strip),
    scale=st.floats(-2, 2),
    with_gradient=st.booleans(),
)
def test_a_request_survives_the_wire(shape: tuple[int, int, int], text: str, scale: float, with_gradient: bool) -> None:
    batch, height, width = shape
    images = np.random.default_rng(0).random((batch, 3, height, width), dtype=np.float32)
    sent = RewardRequest(text, images, (PromptPair(text, text, text),) * batch, (scale,) * batch, with_gradient)
    got = RewardRequest.from_bytes(sent.to_bytes())
    np.testing.assert_array_equal(got.images, sent.images)
    assert (got.reward, got.pairs, got.preference_scales, got.with_gradient) == (
        (sent.reward, sent.pairs, sent.preference_scales, sent.with_gradient)
    )


@pytest.mark.parametrize("image_gradient", [None, REQUEST.images])
def test_a_response_survives_the_wire(image_gradient: Any) -> None:
    numbers = np.array([0.5], np.float32)
    sent = RewardResponse(numbers, numbers + 1, numbers - 1, image_gradient, "clip@sha256:0", "id-1")
    got = RewardResponse.from_bytes(sent.to_bytes())
    for field in ("rewards", "positive_similarities", "negative_similarities"):
        np.testing.assert_array_equal(getattr(got, field), getattr(sent, field))
    assert (got.image_gradient is None) == (image_gradient is None)
    assert (got.scorer, got.request_id) == (sent.scorer, sent.request_id)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pairs": [{"prompt": "a", "positive": "b"}]}, "negative"),
        ({"pairs": [{"prompt": "a", "positive": " ", "negative": "c"}]}, "pair.positive"),
        ({"pairs": [{"prompt": "a", "positive": 3, "negative": "c"}]}, "pair.positive"),
        ({"pairs": ["a"]}, "reward request"),
        ({"pairs": []}, "0 pairs"),
        ({"reward": None}, "reward"),
        ({"with_gradient": "yes"}, "with_gradient"),
        ({"preference_scales": ["much"]}, "preference_scales"),
        ({"preference_scales": [10**400]}, "preference_scales"),
        ({"preference_scales": [float("nan")]}, "preference_scales"),
        ({"preference_scales": 0.1}, "preference_scales"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ContractError, match=named):
        RewardRequest.from_bytes(body_with(**fields))


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((1, 3, 2, 2), np.float64), "float32"),
        (np.zeros((1, 4, 2, 2), np.float32), "(1, 4, 2, 2)"),
        (np.zeros((3, 2, 2), np.float32), "(3, 2, 2)"),
        (np.zeros((1, 3, 0, 2), np.float32), "(1, 3, 0, 2)"),
        (np.zeros((2, 3, 2, 2), np.float32), "2 images"),
        (np.full((1, 3, 2, 2), np.nan, np.float32), "[0, 1]"),
        (np.full((1, 3, 2, 2), np.inf, np.float32), "[0, 1]"),
        (np.full((1, 3, 2, 2), 255, np.float32), "255"),
    ],
)
def test_wrong_images_are_named(images: Any, named: str) -> None:
    with pytest.raises(ContractError) as caught:
        replace(REQUEST, images=images)
    assert named in str(caught.value)


@given(st.binary(max_size=200))
def test_a_body_of_noise_is_a_contract_error(body: bytes) -> None:
    with pytest.raises(ContractError):
        RewardRequest.from_bytes(body)


@given(position=st.integers(0, len(REQUEST.to_bytes()) - 1), byte=st.integers(0, 255))
def test_a_damaged_body_is_a_contract_error_or_another_valid_request(position: int, byte: int) -> None:
    body = bytearray(REQUEST.to_bytes())
    body[position] = byte
    with suppress(ContractError):  # any other exception fails the test
        RewardRequest.from_bytes(bytes(body))


def test_deeply_nested_json_is_a_contract_error() -> None:
    body = save({"images": REQUEST.images}, metadata={"message": "[" * 100_000})
    with pytest.raises(ContractError):
        RewardRequest.from_bytes(body)


def test_swapping_a_pair_twice_is_the_pair() -> None:
    assert PAIR.swapped() == PromptPair(prompt="grinning face", positive="Flat", negative="3D")
    assert PAIR.swapped().swapped() == PAIR
    assert PAIR.swapped().positive_text == PAIR.negative_text == "Flat. grinning face"


def test_a_word_of_none_leaves_the_prompt_as_it_is_across_the_wire() -> None:
    pair = PromptPair("red heart", None, "Flat")
    assert (pair.positive_text, pair.negative_text) == ("red heart", "Flat. red heart")
    assert pair.swapped() == PromptPair("red heart", "Flat", None)
    sent = RewardRequest("tiny", np.zeros((1, 3, 2, 2), np.float32), (pair,), (0.0,))
    assert RewardRequest.from_bytes(sent.to_bytes()).pairs == (pair,)
    with pytest.raises(ContractError, match=r"pair\.prompt"):
        PromptPair(None, "3D", "Flat")  # type: ignore[arg-type]
