"""Define what a reward must offer to be served: one of three protocols, told apart with isinstance.

    TwoTower   image and text are embedded apart; their dot product is the similarity. A prompt pair costs one image
               forward, and text embeddings can be cached. CLIP, PickScore, HPS v2.
    ImageOnly  the image alone has a score; the text is ignored. The service answers it as positive similarity,
               with 0 as negative similarity, so that the relative reward is (1 + k)·score. Aesthetic v2.5.
    Joint      a model that reads image and text together: a prompt pair costs two forwards (and two backwards),
               one for each text, and nothing can be cached. ImageReward, HPS v3.

Images are (batch, 3, height, width) in [0, 1], of any size (one size within a batch), on any device; the model does
its own preprocessing as differentiable tensor operations and treats the images of a batch independently. It returns
float32 on the model's device, differentiable with respect to the images unless stated otherwise. If no gradient is
wanted, images may also be bytes (uint8, 255 means 1) on the CPU: a model whose published preprocessing resizes bytes
then does the same, and its score is the published one, without rounding differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from services.contract import ContractError


@runtime_checkable
class TwoTower(Protocol):
    checksum: str  # of the weights, "sha256:…"
    max_text_tokens: int
    logit_scale: float | None  # the model's own P(i preferred to j) is sigmoid(logit_scale·(r_i − r_j)), None: has none

    def embed_image(self, images: Tensor) -> Tensor:
        """Embed (batch, 3, height, width) as (batch, embedding), of length one or, as a mean over views, less."""
        ...

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (batch, embedding) of length one, without gradient. Raise TextTooLong naming the text."""
        ...


@runtime_checkable
class ImageOnly(Protocol):
    checksum: str
    logit_scale: float | None

    def score_image(self, images: Tensor) -> Tensor:
        """Score (batch, 3, height, width) as (batch,), in the units that the authors publish."""
        ...


@runtime_checkable
class Joint(Protocol):
    checksum: str
    max_text_tokens: int
    logit_scale: float | None

    def score_pairs(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Score (batch, 3, height, width), one text for each, as (batch,). Raise TextTooLong naming the text."""
        ...


RewardModel = TwoTower | ImageOnly | Joint


@runtime_checkable
class Shrinks(Protocol):
    """What a model of any kind may offer in addition, if its preprocessing begins with bytes."""

    def shrink(self, images: Tensor) -> Tensor:
        """Turn bytes (batch, 3, height, width) on the CPU into mostly fewer bytes, for which the model gives the same.

        May be called from any thread, while the model runs in its own.
        """
        ...


class TextTooLong(ContractError):
    """A text with more tokens than the reward reads."""

    reason = "text_too_long"


def check_length(text: str, num_tokens: int, max_tokens: int) -> None:
    """Raise TextTooLong if the text does not fit: published code cuts such a text without a word."""
    if num_tokens > max_tokens:
        raise TextTooLong(f"text has {num_tokens} tokens, but this reward reads at most {max_tokens}; shorten {text!r}")
