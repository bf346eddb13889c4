"""Limit what one request may cost: each limit is a key of deploy/serve.yaml, each excess an error with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.contract import ContractError, RewardRequest

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class LimitExceeded(ContractError):
    """A request over a limit; the text names the limit and the number, and `reason` is the limit's key."""

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(limit, text)  # both, so that it survives pickling
        self.reason, self._text = limit, text

    def __str__(self) -> str:
        return self._text


class Limits(BaseModel):
    """`limits` in the service's arguments; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_body_bytes: Positive = 256 * 2**20  # 40 images of 720 x 720 pixels in float32
    max_bytes_in_flight: Positive = 2**31  # of all bodies at once at each replica, without the pixels made of them
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
    # of all answers kept for their Idempotency-Key; 8 float32 gradients of 512 x 512 pixels are 24 MiB
    max_stored_answer_bytes: Positive = 64 * 2**20
    answer_ttl_s: Seconds = 600.0

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_in_flight is {self.max_bytes_in_flight}, less than max_body_bytes, {self.max_body_bytes}: "
                "the largest body could never be read"
            )
        return self

    def check_num_images(self, num_images: int) -> None:
        """Raise LimitExceeded if there are too many images; call it before they are opened."""
        if num_images > self.max_images:
            raise self.too_many_images(str(num_images))

    def too_many_images(self, found: str) -> LimitExceeded:
        return LimitExceeded("max_images", f"{found} images; a request may have at most {self.max_images} (max_images)")

    def check_images(self, sizes_px: Sequence[tuple[int, int]]) -> None:
        """Raise LimitExceeded if images of these (height, width) are too large; call it before they are decoded."""
        self.check_num_images(len(sizes_px))
        for index, (height, width) in enumerate(sizes_px):
            if height * width > self.max_pixels_per_image:
                allowed = f"{self.max_pixels_per_image} pixels (max_pixels_per_image)"
                error = f"images[{index}] is {width} x {height}; an image may have at most {allowed}"
                raise LimitExceeded("max_pixels_per_image", error)
            if max(height, width) > self.max_aspect_ratio * min(height, width):
                allowed = f"{self.max_aspect_ratio:g} times as long as wide (max_aspect_ratio)"
                error = f"images[{index}] is {width} x {height}; an image may be at most {allowed}"
                raise LimitExceeded("max_aspect_ratio", error)
        if (total := sum(height * width for height, width in sizes_px)) > self.max_pixels_per_request:
            allowed = f"{self.max_pixels_per_request} (max_pixels_per_request)"
            error = f"{total} pixels in all images; a request may have at most {allowed}"
            raise LimitExceeded("max_pixels_per_request", error)

    def check(self, request: RewardRequest) -> None:
        """Raise LimitExceeded if the request's images or texts exceed a limit."""
        self.check_images([image.shape[1:] for image in request.images])
        for index, pair in enumerate(request.pairs):
            for field in ("prompt", "positive", "negative"):
                if (num_chars := len(getattr(pair, field) or "")) > self.max_text_chars:  # a word may be None
                    allowed = f"{self.max_text_chars} (max_text_chars)"
                    error = f"pairs[{index}].{field} has {num_chars} characters; a text may have at most {allowed}"
                    raise LimitExceeded("max_text_chars", error)
