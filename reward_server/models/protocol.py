"""What a reward must offer to be served: one of three protocols, told apart with isinstance.

    TwoTower   image and text are embedded apart; their dot product is the similarity. A prompt pair costs one image
               forward, and text embeddings can be cached. CLIP, PickScore, HPS v2.
    ImageOnly  the image alone has a score; the text is ignored. The service answers it as positive similarity,
               with 0 as negative similarity, so that the relative reward is (1 + k)·score. Aesthetic v2.5.
    Joint      a model that reads image and text together: a prompt pair costs two forwards (and two backwards),
               one for each text, and nothing can be cached. ImageReward, HPS v3.

Images are (batch, 3, height, width) in [0, 1], of any size (one size within a batch), on any device; the model does
its own preprocessing as differentiable tensor operations and treats the images of a batch independently. What comes
back is on the model's device, float32, and differentiable with respect to the images unless it says otherwise. Where
no gradient is wanted, images may also be bytes (uint8, 255 means 1) on the CPU: a model whose published preprocessing
resizes bytes then does the same, and its score is the published one without a rounding between.
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
        """(batch, 3, height, width) -> (batch, embedding). At most of length one: a mean over views is shorter."""
        ...

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """(batch, embedding) of length one, no gradient. ContractError naming a text that is too long: none is cut."""
        ...


@runtime_checkable
class ImageOnly(Protocol):
    checksum: str
    logit_scale: float | None

    def score_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch,), in the units that the authors publish."""
        ...


@runtime_checkable
class Joint(Protocol):
    checksum: str
    max_text_tokens: int
    logit_scale: float | None

    def score_pairs(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(batch, 3, height, width) and one text for each -> (batch,). ContractError naming a text that is too long."""
        ...


RewardModel = TwoTower | ImageOnly | Joint


@runtime_checkable
class Shrinks(Protocol):
    """What a model of any of the three may offer besides, if its preprocessing begins with bytes."""

    def shrink(self, images: Tensor) -> Tensor:
        """Bytes (batch, 3, height, width) on the CPU -> bytes, mostly fewer, of which the model makes the same.

        From any thread, beside the model's own.
        """
        ...


class TextTooLong(ContractError):
    """A text of more tokens than the reward reads."""

    reason = "text_too_long"


def check_length(text: str, num_tokens: int, max_tokens: int) -> None:
    """Raise TextTooLong where the text does not fit: published code cuts such a text and says nothing."""
    if num_tokens > max_tokens:
        raise TextTooLong(
            f"text of {num_tokens} tokens, but this reward reads at most {max_tokens}; shorten it: {text!r}"
        )
