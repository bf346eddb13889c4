"""Messages of the reward API: they survive packing, their bytes stay the same, and malformed ones are named."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from services.contract import ContractError, Images, PromptPair, RewardRequest, RewardResponse, WeightedReward
from services.wire_format import MAX_HEADER_BYTES

GOLDEN = Path(__file__).parents[2] / "golden" / "reward_request.safetensors"
PAIR = PromptPair(prompt="grinning face", positive="3D", negative="Flat")
IMAGES = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2)
REQUEST = RewardRequest(IMAGES, (PAIR,), (0.25,), (WeightedReward("fluent-clip"),))


def body_with(tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """Return the bytes of a request with some fields of its message replaced, or removed if None."""
    message = {
        "pairs": [{"prompt": "a", "positive": "b", "negative": "c"}],
        "preference_scales": [0.1],
        "rewards": [{"name": "fluent-clip", "weight": 1}],
        "with_gradient": True,
        "gradient_dtype": "float32",
    } | changes
    message = {field: value for field, value in message.items() if value is not None}
    return save(tensors or {"images": IMAGES}, metadata={"message": json.dumps(message)})


def body_of_header(header: dict[str, Any], num_data_bytes: int) -> bytes:
    text = json.dumps(header | {"__metadata__": {"message": "{}"}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_data_bytes)


def assert_same_images(got: Images | None, sent: Images | None) -> None:
    assert type(got) is type(sent)
    if got is None or sent is None:
        return
    for one, other in zip(got, sent, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_request_bytes_are_those_of_the_first_release() -> None:
    assert REQUEST.to_bytes() == GOLDEN.read_bytes()


image_shapes = st.lists(st.tuples(st.just(3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@given(
    shapes=image_shapes,
    is_stacked=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, np.uint8]),
    text=st.text(min_size=1).filter(str.strip),
    number=st.floats(-2, 2),
    with_gradient=st.booleans(),
    gradient_dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=50)
def test_a_request_survives_the_wire(
    shapes: list[tuple[int, int, int]],
    is_stacked: bool,
    dtype: Any,
    text: str,
    number: float,
    with_gradient: bool,
    gradient_dtype: str,
) -> None:
    random = np.random.default_rng(0)
    batch, images = len(shapes), tuple(random.random(shape).astype(dtype) for shape in shapes)
    sent = RewardRequest(
        images=np.stack([images[0]] * batch) if is_stacked else images,
        pairs=(PromptPair(text, text, text),) * batch,
        preference_scales=(number,) * batch,
        rewards=(WeightedReward(text, number), WeightedReward(text + text)),
        with_gradient=with_gradient,
        gradient_dtype=gradient_dtype,
    )
    got = RewardRequest.from_bytes(sent.to_bytes())
    assert_same_images(got.images, sent.images)
    for field in ("pairs", "preference_scales", "rewards", "with_gradient", "gradient_dtype"):
        assert getattr(got, field) == getattr(sent, field)


@pytest.mark.parametrize("image_gradient", [None, IMAGES, tuple(IMAGES), tuple(IMAGES.astype(np.float16))])
def test_a_response_survives_the_wire(image_gradient: Any) -> None:
    numbers = np.array([0.5], np.float32)
    sent = RewardResponse(numbers, numbers[None] + 1, numbers[None] - 1, image_gradient, ("clip@sha256:0",), "id-1")
    got = RewardResponse.from_bytes(sent.to_bytes())
    for field in ("rewards", "positive_similarities", "negative_similarities"):
        np.testing.assert_array_equal(getattr(got, field), getattr(sent, field))
    assert_same_images(got.image_gradient, sent.image_gradient)
    assert (got.scorers, got.request_id) == (sent.scorers, sent.request_id)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pairs": [{"prompt": "a", "positive": "b"}]}, "missing field of PromptPair: 'negative'"),
        ({"pairs": [{"prompt": "a", "positive": " ", "negative": "c"}]}, "pair.positive"),
        ({"pairs": [{"prompt": "a", "positive": 3, "negative": "c"}]}, "pair.positive"),
        ({"pairs": [{"prompt": "\ud83d", "positive": "b", "negative": "c"}]}, "pair.prompt.*UTF-16"),
        ({"pairs": ["a"]}, "PromptPair must be a JSON object"),
        ({"pairs": []}, "0 pairs"),
        ({"pairs": "a"}, "pairs must be list"),
        ({"rewards": []}, "rewards"),
        ({"rewards": ["hps"]}, "WeightedReward"),
        ({"rewards": [{"name": "hps", "weight": "1"}]}, "reward.weight"),
        ({"rewards": [{"name": "hps", "weight": float("inf")}]}, "reward.weight"),
        ({"rewards": [{"name": "hps", "weight": 1}, {"name": "hps", "weight": 2}]}, "none twice"),
        ({"rewards": [{"name": "hps", "weight": 1, "bias": 1}]}, "unknown field of WeightedReward: 'bias'"),
        ({"with_gradient": "yes"}, "with_gradient"),
        ({"gradient_dtype": "float64"}, "gradient_dtype.*float64"),
        ({"gradient_dtype": None}, "missing field: 'gradient_dtype'"),
        ({"reward": "hps"}, "unknown field: 'reward'"),
        ({"preference_scales": ["much"]}, r"preference_scales\[0\].*much"),
        ({"preference_scales": [True]}, r"preference_scales\[0\]"),
        ({"preference_scales": [10**400]}, r"preference_scales\[0\]"),
        ({"preference_scales": [1e39]}, r"preference_scales\[0\]"),
        ({"preference_scales": [float("nan")]}, r"preference_scales\[0\]"),
        ({"preference_scales": 0.1}, "preference_scales"),
        ({"tensors": {"images": IMAGES, "mask": IMAGES}}, "unknown tensor: 'mask'"),
        ({"tensors": {"images": IMAGES, "images.0": IMAGES[0]}}, "unknown tensor: 'images.0'"),
        ({"tensors": {"images.0": IMAGES[0], "images.2": IMAGES[0]}}, "unknown tensor: 'images.2'"),
        ({"tensors": {"images.1": IMAGES[0]}}, "no tensor 'images'"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ContractError, match=named):
        RewardRequest.from_bytes(body_with(**fields))


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((1, 3, 2, 2), np.float64), "float64"),
        (np.zeros((1, 4, 2, 2), np.float32), "(1, 4, 2, 2)"),
        (np.zeros((1, 3, 2), np.float32), "(1, 3, 2)"),
        (np.zeros((1, 3, 0, 2), np.float32), "(1, 3, 0, 2)"),
        (np.zeros((2, 3, 2, 2), np.float32), "2 images"),
        (np.full((1, 3, 2, 2), np.nan, np.float32), "[0, 1]"),
        (np.full((1, 3, 2, 2), np.inf, np.float16), "[0, 1]"),
        (np.full((1, 3, 2, 2), 255, np.float32), "255"),
        ((np.zeros((1, 3, 2, 2), np.uint8),), "images[0]"),
        ((np.zeros((3, 2, 2), np.int64),), "images[0]"),
        ((np.full((3, 2, 2), -1, np.float16),), "images[0]"),
        ((), "0 images"),
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


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, len(REQUEST.to_bytes()) - 1])
def test_a_truncated_body_is_a_contract_error(num_bytes: int) -> None:
    with pytest.raises(ContractError):
        RewardRequest.from_bytes(REQUEST.to_bytes()[:num_bytes])


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1),
        body_of_header({"images": {"dtype": "U8", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, 8),
        body_of_header({"images": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, 8),
        body_of_header({"images": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]}}, 8),
        body_of_header({"images": {"dtype": "U8", "shape": [8], "data_offsets": [0, 2**62]}}, 8),
        body_of_header({"images": {"dtype": "U8", "shape": [1] * 100, "data_offsets": [0, 1]}}, 1),
        body_of_header({"images": {"dtype": "BF16", "shape": [1, 3, 1, 1], "data_offsets": [0, 6]}}, 6),
        body_of_header(
            {f"images.{index}": {"dtype": "U8", "shape": [3, 1, 1], "data_offsets": [0, 3]} for index in range(2)}, 3
        ),  # two tensors of the same bytes
    ],
)
def test_a_hostile_header_is_a_contract_error(body: bytes) -> None:
    with pytest.raises(ContractError):
        RewardRequest.from_bytes(body)


def test_deeply_nested_json_is_a_contract_error() -> None:
    body = save({"images": IMAGES}, metadata={"message": "[" * 100_000})
    with pytest.raises(ContractError):
        RewardRequest.from_bytes(body)


def test_a_whole_number_is_read_as_a_float() -> None:
    assert RewardRequest.from_bytes(body_with(preference_scales=[2**64])).preference_scales == (2.0**64,)


@pytest.mark.parametrize(
    "body",
    [
        body_with(gradient_dtype="x" * 100_000),
        body_with(tensors={"x" * 100_000: IMAGES}),
        body_of_header({"images": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 1]}}, 1),
    ],
)
def test_an_error_does_not_repeat_a_long_value(body: bytes) -> None:
    with pytest.raises(ContractError) as caught:
        RewardRequest.from_bytes(body)
    assert len(str(caught.value)) < 1000


def test_swapping_a_pair_twice_is_the_pair() -> None:
    assert PAIR.swapped() == PromptPair(prompt="grinning face", positive="Flat", negative="3D")
    assert PAIR.swapped().swapped() == PAIR
    assert PAIR.swapped().positive_text == PAIR.negative_text == "Flat. grinning face"


def test_a_word_of_none_leaves_the_prompt_as_it_is_across_the_wire() -> None:
    pair = PromptPair("red heart", None, "Flat")
    assert (pair.positive_text, pair.negative_text) == ("red heart", "Flat. red heart")
    assert pair.swapped() == PromptPair("red heart", "Flat", None)
    sent = RewardRequest(IMAGES, (pair,), (0.0,), REQUEST.rewards)
    assert RewardRequest.from_bytes(sent.to_bytes()).pairs == (pair,)
    with pytest.raises(ContractError, match=r"pair\.prompt"):
        PromptPair(None, "3D", "Flat")  # type: ignore[arg-type]
