"""What one request may cost: each limit is a key of deploy/serve.yaml, and each excess an error with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from services.contract import ContractError, RewardRequest

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class LimitExceeded(ContractError):
    """A request that is well formed but asks for too much; the text names the limit and the number.

    Its reason is the limit, a key of Limits.
    """

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(limit, text)  # both, so that it survives pickling
        self.reason, self._text = limit, text

    def __str__(self) -> str:
        return self._text


class Limits(BaseModel):
    """`limits` in the service's arguments; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_body_bytes: Positive = 256 * 2**20  # 40 images of 720 x 720 pixels in float32
    max_images: Positive = 256
    max_pixels_per_image: Positive = 4096**2
    max_pixels_per_request: Positive = 4 * 4096**2  # 200 MB as bytes, 800 MB as the float32 of a gradient
    max_aspect_ratio: Annotated[float, Field(ge=1)] = (
        16  # models scale the short side up to theirs, and the long with it
    )
    max_text_chars: Positive = 4096  # of a prompt and of each control word
    body_timeout_s: Seconds = 60.0
    chunk_timeout_s: Seconds = 10.0  # the longest pause within a body
    requests_per_s: Seconds = 200.0  # of each API key (without keys: of each address) at each replica
    request_burst: Positive = 400
    max_stored_answer_bytes: Positive = 16 * 2**20  # of all answers kept for their Idempotency-Key
    answer_ttl_s: Seconds = 600.0

    def check_images(self, sizes_px: Sequence[tuple[int, int]]) -> None:
        """(height, width) of every image, before they are decoded. Raises LimitExceeded."""
        if len(sizes_px) > self.max_images:
            error = f"{len(sizes_px)} images; a request may have {self.max_images} (max_images)"
            raise LimitExceeded("max_images", error)
        for index, (height, width) in enumerate(sizes_px):
            if height * width > self.max_pixels_per_image:
                allowed = f"{self.max_pixels_per_image} pixels (max_pixels_per_image)"
                error = f"images[{index}] is {width} x {height}; an image may have {allowed}"
                raise LimitExceeded("max_pixels_per_image", error)
            if max(height, width) > self.max_aspect_ratio * min(height, width):
                allowed = f"{self.max_aspect_ratio:g} times as long as wide (max_aspect_ratio)"
                error = f"images[{index}] is {width} x {height}; an image may be at most {allowed}"
                raise LimitExceeded("max_aspect_ratio", error)
        if (total := sum(height * width for height, width in sizes_px)) > self.max_pixels_per_request:
            allowed = f"{self.max_pixels_per_request} (max_pixels_per_request)"
            error = f"{total} pixels in all images; a request may have {allowed}"
            raise LimitExceeded("max_pixels_per_request", error)

    def check(self, request: RewardRequest) -> None:
        """Raises LimitExceeded."""
        self.check_images([image.shape[1:] for image in request.images])
        for index, pair in enumerate(request.pairs):
            for field in ("prompt", "positive", "negative"):
                if (num_chars := len(getattr(pair, field) or "")) > self.max_text_chars:  # a word may be None
                    allowed = f"{self.max_text_chars} (max_text_chars)"
                    error = f"pairs[{index}].{field} has {num_chars} characters; a text may have {allowed}"
                    raise LimitExceeded("max_text_chars", error)
