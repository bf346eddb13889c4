"""The messages between the reward service and its callers: what a request may hold, and what is answered.

One binary format in both directions, safetensors (wire_format.py). Arrays are numpy, so that neither side imposes its
tensor library on the other.

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

from dataclasses import asdict, dataclass, fields
from reprlib import repr as shorten  # values in errors
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.wire_format import ContractError, Images, check_keys, name_images, pack, take_images, typed, unpack

__all__ = [
    "GRADIENT_DTYPES",
    "IDEMPOTENCY_KEY_HEADER",
    "IMAGE_DTYPES",
    "MEDIA_TYPE",
    "MODELS_PATH",
    "RANK_PATH",
    "READY_PATH",
    "REQUEST_ID_HEADER",
    "REWARDS_PATH",
    "SCORE_PATH",
    "ContractError",
    "Float32",
    "Images",
    "PromptPair",
    "RewardRequest",
    "RewardResponse",
    "WeightedReward",
]

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
_FLOAT32_MAX = float(np.finfo(np.float32).max)

Float32 = NDArray[np.float32]
_Part = TypeVar("_Part", "PromptPair", "WeightedReward")


@dataclass(frozen=True, slots=True)
class PromptPair:
    """A prompt under a positive and a negative control word (SRPO, arXiv 2509.06942, section 3.3).

    None in place of a word leaves the prompt as it is. Raise ContractError for an empty text.

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
        """The prompt under the positive word."""
        return self._under(self.positive)

    @property
    def negative_text(self) -> str:
        """The prompt under the negative word."""
        return self._under(self.negative)

    def swapped(self) -> PromptPair:
        """Return the pair of the invert branch: what was wanted is now to be avoided."""
        return PromptPair(prompt=self.prompt, positive=self.negative, negative=self.positive)

    def _under(self, word: str | None) -> str:
        return self.prompt if word is None else f"{word}. {self.prompt}"


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward by its name in the service, and its factor in the combined reward Σ weight · reward."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_text("reward.name", self.name)
        _check_finite("reward.weight", self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class RewardRequest:
    """Images, each with its own prompt pair, for one reward or for a weighted sum of several.

    images: stacked or mixed (see above); float32 or float16 in [0, 1], or uint8, where 255 means 1.
    pairs, preference_scales: one for each image; the scale is k in (1 + k) · positive − negative.
    gradient_dtype: of the answer's image_gradient; float16 halves its bytes and loses what is below 6e-8.
    Raise ContractError if lengths, a shape, dtype or value break this.
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
            raise ContractError(f"rewards must name at least one reward, and none twice, not {shorten(names)}")
        if self.gradient_dtype not in GRADIENT_DTYPES:
            raise ContractError(f"gradient_dtype must be one of {GRADIENT_DTYPES}, not {shorten(self.gradient_dtype)}")

    def to_bytes(self) -> bytes:
        """Return the body of a request to REWARDS_PATH."""
        message = {
            "pairs": [asdict(pair) for pair in self.pairs],
            "preference_scales": list(self.preference_scales),
            "rewards": [asdict(reward) for reward in self.rewards],
            "with_gradient": self.with_gradient,
            "gradient_dtype": self.gradient_dtype,
        }
        return pack(name_images("images", self.images), message)

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardRequest:
        """Return the request in a body. Raise ContractError, which names what is missing, unknown or wrong."""
        arrays, message = unpack(body)
        images = take_images("images", arrays)
        if images is None:
            raise ContractError("no tensor 'images' or 'images.0'")
        check_keys("tensor", arrays, set())
        check_keys("field", message, {field.name for field in fields(cls)} - {"images"})
        return cls(
            images=images,
            pairs=tuple(_from_json(PromptPair, pair) for pair in typed(message, "pairs", list)),
            preference_scales=_numbers(message, "preference_scales"),
            rewards=tuple(_from_json(WeightedReward, reward) for reward in typed(message, "rewards", list)),
            with_gradient=typed(message, "with_gradient", bool),
            gradient_dtype=typed(message, "gradient_dtype", str),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RewardResponse:
    """What the service answers, in the order of the request's images and rewards.

    rewards (batch,): Σ weight · ((1 + k) · positive_similarity − negative_similarity).
    positive_similarities, negative_similarities (num_rewards, batch): a reward that reads no text answers its value as
    the positive one, and 0 as the negative one.
    image_gradient: ∂ rewards / ∂ images in the layout of the request, for images in [0, 1] even if they were sent as
    uint8; None if it was not requested.
    scorers (num_rewards): each model with the checksum of its weights, "name@sha256:…", followed by "+crops=n" if it
    also looks at n crops.
    """

    rewards: Float32
    positive_similarities: Float32
    negative_similarities: Float32
    image_gradient: Images | None
    scorers: tuple[str, ...]
    request_id: str

    def to_bytes(self) -> bytes:
        """Return the body of an answer."""
        arrays = {
            "rewards": self.rewards,
            "positive_similarities": self.positive_similarities,
            "negative_similarities": self.negative_similarities,
        }
        if self.image_gradient is not None:
            arrays |= name_images("image_gradient", self.image_gradient)
        return pack(arrays, {"scorers": list(self.scorers), "request_id": self.request_id})

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardResponse:
        """Return the answer in a body. Raise ContractError if it is none."""
        arrays, message = unpack(body)
        image_gradient = take_images("image_gradient", arrays)
        numbers = {"rewards", "positive_similarities", "negative_similarities"}
        check_keys("tensor", arrays, numbers)
        check_keys("field", message, {"scorers", "request_id"})
        return cls(
            **arrays,
            image_gradient=image_gradient,
            scorers=tuple(typed(message, "scorers", list)),
            request_id=typed(message, "request_id", str),
        )


def _check_images(images: Images) -> None:
    """Raise ContractError for a wrong shape, dtype or value. Stacked images are checked at once, which is cheaper."""
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
        raise ContractError(f"{name} must have 3 colors, a height and a width, not shape {pixels.shape}")
    if pixels.dtype == np.uint8:
        return
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
        raise ContractError(f"{name} of {pixels.dtype} must lie in [0, 1], not [{low}, {high}]")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ContractError(f"{name} must be a non-empty text, not {shorten(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ContractError(f"{name} holds half of a UTF-16 pair, which is no text: {shorten(value)}") from error


def _check_finite(name: str, value: object) -> None:
    """Raise ContractError unless the number is finite in float32, in which the models compute."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:  # NaN too
        raise ContractError(f"{name} must be a finite number, not {shorten(value)}")


def _from_json(kind: type[_Part], value: object) -> _Part:
    if not isinstance(value, dict):
        raise ContractError(f"{kind.__name__} must be a JSON object, not {shorten(value)}")
    check_keys(f"field of {kind.__name__}", value, {field.name for field in fields(kind)})
    return kind(**value)


def _numbers(message: dict[str, Any], field: str) -> tuple[float, ...]:
    """Return floats, because torch reads no whole numbers beyond 64 bits."""
    values = typed(message, field, list)
    for index, value in enumerate(values):
        _check_finite(f"{field}[{index}]", value)
    return tuple(map(float, values))
