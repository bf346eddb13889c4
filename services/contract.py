"""The wire: what is asked of the reward service and what it answers, and their bytes.

One binary format in both directions, safetensors: a header of JSON and raw numbers, so a hostile body can be
rejected but never executed. Arrays are numpy, so that neither side imposes its tensor library on the other.

    request = RewardRequest(
        reward="fluent-clip",
        images=np.zeros((1, 3, 64, 64), np.float32),
        pairs=(PromptPair(prompt="grinning face", positive="3D", negative="Flat"),),
        preference_scales=(0.1,),
    )
    response = RewardResponse.from_bytes(http_post(REWARDS_PATH, request.to_bytes()))
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

REWARDS_PATH = "/v1/rewards"
MODELS_PATH = "/v1/models"
READY_PATH = "/readyz"
MEDIA_TYPE = "application/vnd.safetensors"
_META_BYTES = 8  # a safetensors file begins with the length of its JSON header, 64 bit little endian

Float32 = NDArray[np.float32]


class ContractError(ValueError):
    """A message that breaks the contract; the text names the field and the offending value."""


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
        for field, value in asdict(self).items():
            if value is None and field != "prompt":
                continue
            if not isinstance(value, str) or not value.strip():
                raise ContractError(f"pair.{field} must be a non-empty text, not {value!r}")

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


@dataclass(frozen=True, slots=True, eq=False)
class RewardRequest:
    """Images to be judged, each under its own prompt pair.

    images (batch, 3, height, width) float32 in [0, 1]; one pair and one preference_scale (k) for each image.
    Raises ContractError where lengths, shape, dtype or values break that.
    """

    reward: str
    images: Float32
    pairs: tuple[PromptPair, ...]
    preference_scales: tuple[float, ...]
    with_gradient: bool = True

    def __post_init__(self) -> None:
        shape, batch = self.images.shape, len(self.pairs)
        if self.images.dtype != np.float32:
            raise ContractError(f"images must be float32, not {self.images.dtype}")
        if self.images.ndim != 4 or shape[1] != 3 or 0 in shape:
            raise ContractError(f"images must be (batch, 3, height, width), not {shape}")
        if shape[0] != batch or batch != len(self.preference_scales):
            raise ContractError(
                f"{shape[0]} images, {batch} pairs and {len(self.preference_scales)} preference_scales: "
                "there must be one of each per image"
            )
        if not np.isfinite(self.preference_scales).all():
            raise ContractError(f"preference_scales must be finite, not {self.preference_scales}")
        low, high = float(self.images.min()), float(self.images.max())
        if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
            raise ContractError(f"images must lie in [0, 1], not [{low}, {high}]")

    def to_bytes(self) -> bytes:
        meta = {
            "reward": self.reward,
            "pairs": [asdict(pair) for pair in self.pairs],
            "preference_scales": list(self.preference_scales),
            "with_gradient": self.with_gradient,
        }
        return _pack({"images": self.images}, meta)

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardRequest:
        arrays, meta = _unpack(body)
        try:
            return cls(
                reward=_typed(meta, "reward", str),
                images=arrays["images"],
                pairs=tuple(PromptPair(**pair) for pair in _typed(meta, "pairs", list)),
                preference_scales=_numbers(meta, "preference_scales"),
                with_gradient=_typed(meta, "with_gradient", bool),
            )
        except (KeyError, TypeError) as error:
            raise ContractError(f"reward request: missing or malformed field {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class RewardResponse:
    """What the service answers, in the order of the request's images.

    rewards, positive_similarities, negative_similarities: (batch,); image_gradient: ∂ reward / ∂ image, shaped as
    the images, None unless asked for. `scorer` names the model and the checksum of its weights.
    """

    rewards: Float32
    positive_similarities: Float32
    negative_similarities: Float32
    image_gradient: Float32 | None
    scorer: str
    request_id: str

    def to_bytes(self) -> bytes:
        arrays = {
            "rewards": self.rewards,
            "positive_similarities": self.positive_similarities,
            "negative_similarities": self.negative_similarities,
        }
        if self.image_gradient is not None:
            arrays["image_gradient"] = self.image_gradient
        return _pack(arrays, {"scorer": self.scorer, "request_id": self.request_id})

    @classmethod
    def from_bytes(cls, body: bytes) -> RewardResponse:
        arrays, meta = _unpack(body)
        try:
            return cls(
                rewards=arrays["rewards"],
                positive_similarities=arrays["positive_similarities"],
                negative_similarities=arrays["negative_similarities"],
                image_gradient=arrays.get("image_gradient"),
                scorer=_typed(meta, "scorer", str),
                request_id=_typed(meta, "request_id", str),
            )
        except KeyError as error:
            raise ContractError(f"reward response: missing field {error}") from error


def _pack(arrays: dict[str, Float32], meta: dict[str, Any]) -> bytes:
    contiguous = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    return save(contiguous, metadata={"message": json.dumps(meta)})


def _unpack(body: bytes) -> tuple[dict[str, Float32], dict[str, Any]]:
    try:
        arrays = load(body)  # validates the header's lengths and offsets before anything reads it
        header_length = int.from_bytes(body[:_META_BYTES], "little")
        header = json.loads(body[_META_BYTES : _META_BYTES + header_length])
        meta = json.loads(header["__metadata__"]["message"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"body is not a safetensors message of this API: {error}") from error
    if not isinstance(meta, dict):
        raise ContractError(f"message must be a JSON object, not {type(meta).__name__}")
    return arrays, meta


def _typed(meta: dict[str, Any], field: str, kind: type) -> Any:
    value = meta[field]
    if not isinstance(value, kind):
        raise ContractError(f"{field} must be {kind.__name__}, not {value!r}")
    return value


def _numbers(meta: dict[str, Any], field: str) -> tuple[float, ...]:
    values = _typed(meta, field, list)
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ContractError(f"{field} must be numbers: {error}") from error
