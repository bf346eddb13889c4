"""The wire: what is asked of the reward service and what it answers, and their bytes.

One binary format in both directions, safetensors: a header of JSON and raw numbers, so a hostile body can be
rejected but never executed. Arrays are numpy, so that neither side imposes its tensor library on the other.

    request = RewardRequest(
        images=np.zeros((1, 3, 64, 64), np.float32),
        pairs=(PromptPair(prompt="grinning face", positive="3D", negative="Flat"),),
        preference_scales=(0.1,),
        rewards=(WeightedReward("fluent-clip"),),
    )
    response = RewardResponse.from_bytes(http_post(REWARDS_PATH, request.to_bytes()))

Images and image gradients have one of two layouts. Stacked: one array (batch, 3, height_px, width_px), the tensor
"images". Mixed: a tuple of arrays (3, height_px, width_px) of any sizes, the tensors "images.0", "images.1", …
`len(images)` and `images[index]` mean the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from reprlib import repr as shown  # the caller's values in errors, cut short
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

REWARDS_PATH = "/v1/rewards"
SCORE_PATH = "/v1/score"
RANK_PATH = "/v1/rank"
MODELS_PATH = "/v1/models"
READY_PATH = "/readyz"
MEDIA_TYPE = "application/vnd.safetensors"
IDEMPOTENCY_KEY_HEADER = "idempotency-key"
REQUEST_ID_HEADER = "x-request-id"
IMAGE_DTYPES = ("float32", "float16", "uint8")
GRADIENT_DTYPES = ("float32", "float16")
MAX_HEADER_BYTES = 4 << 20  # JSON takes many times its size in memory; 4 MiB hold the texts of thousands of images
_MAX_NAMES_SHOWN = 5
_MAX_REASON_CHARS = 300
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, 64 bit little endian

Float32 = NDArray[np.float32]
Images = NDArray[Any] | tuple[NDArray[Any], ...]  # stacked or mixed
_Part = TypeVar("_Part", "PromptPair", "WeightedReward")


class ContractError(ValueError):
    """A message that breaks the contract; the text names the field and the offending value.

    `reason`: the kind of mistake as a word, for counters.
    """

    reason = "message"


@dataclass(frozen=True, slots=True)
class PromptPair:
    """One prompt under a positive and a negative control word (SRPO, arXiv 2509.06942, section 3.3).

    A word of None leaves the prompt as it is.

    >>> PromptPair(prompt="grinning face", positive="3D", negative="Flat").positive_text
    '3D. grinning face'
    """

    prompt: str
    positive: str | None
    negative: str | None

    def __post_init__(self) -> None:
        _check_text("pair.prompt", self.prompt)
        for name, word in (("pair.positive", self.positive), ("pair.negative", self.negative)):
            if word is not None:
                _check_text(name, word)

    @property
    def positive_text(self) -> str:
        return self._under(self.positive)

    @property
    def negative_text(self) -> str:
        return self._under(self.negative)

    def swapped(self) -> PromptPair:
        """The pair of the invert branch: what was wanted is now to be avoided."""
        return PromptPair(prompt=self.prompt, positive=self.negative, negative=self.positive)

    def _under(self, word: str | None) -> str:
        return self.prompt if word is None else f"{word}. {self.prompt}"


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One of the service's rewards by its name there, and its factor in the combined reward Σ weight · reward."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_text("reward.name", self.name)
        _check_finite("reward.weight", self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class RewardRequest:
    """Images to be judged, each under its own prompt pair, by one reward or by a weighted sum of several.

    images: stacked or mixed (see above), float32 or float16 in [0, 1], or uint8, where 255 means 1; one pair and one
    preference_scale (k in (1 + k)·positive − negative) for each. gradient_dtype: of the answer's image_gradient;
    float16 halves its bytes and loses what is below 6e-8.
    Raises ContractError where lengths, shape, dtype or values break that.
    """

    images: Images
    pairs: tuple[PromptPair, ...]
    preference_scales: tuple[float, ...]
    rewards: tuple[WeightedReward, ...]
    with_gradient: bool = True
    gradient_dtype: str = "float32"

    def __post_init__(self) -> None:
        counts = {"images": self.images, "pairs": self.pairs, "preference_scales": self.preference_scales}
        if len({len(values) for values in counts.values()}) != 1:
            found = ", ".join(f"{len(values)} {name}" for name, values in counts.items())
            raise ContractError(f"{found}: there must be one of each per image")
        _check_images(self.images)
        for index, scale in enumerate(self.preference_scales):
            _check_finite(f"preference_scales[{index}]", scale)
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) != len(names):
            raise ContractError(f"rewards must name at least one reward, and none twice, not {shown(names)}")
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ContractError(f"gradient_dtype must be one of {GRADIENT_DTYPES}, not {shown(self.gradient_dtype)}")

    def to_bytes(self) -> bytes:
        message = {
            "pairs": [asdict(pair) for pair in self.pairs],
            "preference_scales": list(self.preference_scales),
            "rewards": [asdict(reward) for reward in self.rewards],
            "with_gradient": self.with_gradient,
            "gradient_dtype": self.gradient_dtype,
        }
        return _pack(_named("images", self.images), message)

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardRequest:
        """Raises ContractError naming what is missing, unknown or wrong; float images outside [0, 1] are wrong too."""
        arrays, message = _unpack(body)
        images = _take_images("images", arrays)
        if images is None:
            raise ContractError("no tensor 'images' or 'images.0'")
        _check_keys("tensor", arrays, set())
        _check_keys("field", message, {field.name for field in fields(cls)} - {"images"})
        return cls(
            images=images,
            pairs=tuple(_from_json(PromptPair, pair) for pair in _typed(message, "pairs", list)),
            preference_scales=_numbers(message, "preference_scales"),
            rewards=tuple(_from_json(WeightedReward, reward) for reward in _typed(message, "rewards", list)),
            with_gradient=_typed(message, "with_gradient", bool),
            gradient_dtype=_typed(message, "gradient_dtype", str),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RewardResponse:
    """What the service answers, in the order of the request's images and rewards.

    rewards (batch,): Σ weight · ((1 + k) · positive_similarity − negative_similarity); positive_similarities and
    negative_similarities (num_rewards, batch). A reward that reads no text answers its score as the positive
    similarity, and 0 as the negative one. image_gradient: ∂ rewards / ∂ images (of the images in [0, 1], also where
    they were sent as uint8), in the layout of the request; None unless asked for. scorers (num_rewards): each model
    and the checksum of its weights, "name@sha256:…", then "+crops=n" where it looks at n crops besides.
    """

    rewards: Float32
    positive_similarities: Float32
    negative_similarities: Float32
    image_gradient: Images | None
    scorers: tuple[str, ...]
    request_id: str

    def to_bytes(self) -> bytes:
        arrays = {
            "rewards": self.rewards,
            "positive_similarities": self.positive_similarities,
            "negative_similarities": self.negative_similarities,
        }
        if self.image_gradient is not None:
            arrays |= _named("image_gradient", self.image_gradient)
        return _pack(arrays, {"scorers": list(self.scorers), "request_id": self.request_id})

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardResponse:
        arrays, message = _unpack(body)
        image_gradient = _take_images("image_gradient", arrays)
        numbers = {"rewards", "positive_similarities", "negative_similarities"}
        _check_keys("tensor", arrays, numbers)
        _check_keys("field", message, {"scorers", "request_id"})
        return cls(
            **arrays,
            image_gradient=image_gradient,
            scorers=tuple(_typed(message, "scorers", list)),
            request_id=_typed(message, "request_id", str),
        )


def _check_images(images: Images) -> None:
    """Stacked images are looked at in one go: a check per image would cost more than it tells."""
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise ContractError(f"images must be (batch, 3, height_px, width_px), not {images.shape}")
        _check_pixels("images", images, images.shape[1:])
    for index, image in enumerate(images if isinstance(images, tuple) else ()):
        _check_pixels(f"images[{index}]", image, image.shape)


def _check_pixels(name: str, pixels: NDArray[Any], image_shape: tuple[int, ...]) -> None:
    if pixels.dtype.name not in IMAGE_DTYPES:
        raise ContractError(f"{name} must be one of {IMAGE_DTYPES}, not {pixels.dtype}")
    if len(image_shape) != 3 or image_shape[0] != 3 or 0 in pixels.shape:
        raise ContractError(f"{name} must have 3 colours, a height and a width, not shape {pixels.shape}")
    if pixels.dtype == np.uint8:
        return
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
        raise ContractError(f"{name} of {pixels.dtype} must lie in [0, 1], not [{low}, {high}]")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ContractError(f"{name} must be a non-empty text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ContractError(f"{name} holds half of a UTF-16 pair, which is no text: {shown(value)}") from error


def _check_finite(name: str, value: object) -> None:
    """Finite in float32 too, which is what the models compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:  # NaN too
        raise ContractError(f"{name} must be a finite number, not {shown(value)}")


def _named(name: str, images: Images) -> dict[str, NDArray[Any]]:
    """The tensors of the two layouts."""
    if isinstance(images, np.ndarray):
        return {name: images}
    return {f"{name}.{index}": image for index, image in enumerate(images)}


def _take_images(name: str, arrays: dict[str, NDArray[Any]]) -> Images | None:
    """Removes `name`, or name.0, name.1, … up to the first gap, from arrays."""
    if name in arrays:
        return arrays.pop(name)
    images: list[NDArray[Any]] = []
    while (image := arrays.pop(f"{name}.{len(images)}", None)) is not None:
        images.append(image)
    return tuple(images) or None


def _pack(arrays: Mapping[str, NDArray[Any]], message: dict[str, Any]) -> bytes:
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"message": json.dumps(message)})


def _unpack(body: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    header_bytes = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ContractError(f"header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        arrays = load(body)  # validates the header's lengths and offsets before anything reads it
        header = json.loads(body[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes])
        message = json.loads(header["__metadata__"]["message"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error)[:_MAX_REASON_CHARS]  # it may repeat the caller's text
        raise ContractError(f"body is not a safetensors message of this API: {reason}") from error
    if not isinstance(message, dict):
        raise ContractError(f"message must be a JSON object, not {type(message).__name__}")
    return arrays, message


def _check_keys(kind: str, found: Mapping[str, Any], expected: set[str]) -> None:
    for verdict, names in (("unknown", found.keys() - expected), ("missing", expected - found.keys())):
        if names:
            raise ContractError(f"{verdict} {kind}: {', '.join(map(shown, sorted(names)[:_MAX_NAMES_SHOWN]))}")


def _from_json(kind: type[_Part], value: object) -> _Part:
    if not isinstance(value, dict):
        raise ContractError(f"{kind.__name__} must be a JSON object, not {shown(value)}")
    _check_keys(f"field of {kind.__name__}", value, {field.name for field in fields(kind)})
    return kind(**value)


def _numbers(message: dict[str, Any], field: str) -> tuple[float, ...]:
    """As floats: a whole number may be larger than what torch reads as one."""
    values = _typed(message, field, list)
    for index, value in enumerate(values):
        _check_finite(f"{field}[{index}]", value)
    return tuple(map(float, values))


def _typed(message: dict[str, Any], field: str, kind: type) -> Any:
    value = message[field]
    if not isinstance(value, kind):
        raise ContractError(f"{field} must be {kind.__name__}, not {shown(value)}")
    return value
