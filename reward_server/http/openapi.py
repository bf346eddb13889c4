"""Describe for OpenAPI what FastAPI cannot see: bodies that the routes read themselves, examples, and all errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from reward_server.http.errors import ErrorAnswer
from reward_server.http.requests import FORM_TYPE, JSON_TYPE, PictureRequest
from services.contract import MEDIA_TYPE, PromptPair, RewardRequest, RewardResponse, WeightedReward

TITLE = "srpo-ray reward service"
DESCRIPTION = """
Rewards of images under text-conditioned prompt pairs (SRPO, arXiv 2509.06942), and their gradients.

`POST /v1/score` and `POST /v1/rank` are for people: PNG, JPEG or WebP in, JSON out. `POST /v1/rewards` is for
programs: safetensors in both directions.

**Errors** of the service are `{"error", "request_id"}`; 429 and 503 say in `retry-after` when to try again.
Ray Serve and HAProxy, which stand in front of the service, answer some errors as plain text: Ray Serve 503 (no replica
takes the request; with `retry-after` if its queue is full), 408 (no answer in `request_timeout_s`) and 500 (the replica
died), HAProxy 502, 503 and 504. A request may be sent again after any of these: scoring changes nothing.

**`x-request-id`**, 1 to 128 visible ASCII characters, is returned in the header, in the answer and in the log; without
one the service makes an id. **`idempotency-key`** returns the stored answer to a retried request: each replica keeps
its own answers in memory for `limits.answer_ttl_s` (10 minutes), the newest `limits.max_stored_answer_bytes` (64 MiB).
Such an answer has the header `idempotency-replayed`, and the `request_id` under which it was computed. Another
replica, or the same one later or after a restart, computes the request again.
"""
_RED_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
_PICTURES = "image/png, image/jpeg, image/webp"
_EXAMPLE = {"prompt": "grinning face", "positive": "3D", "negative": "Flat", "preference_scale": 0.1}
_MODEL = {
    "name": "fluent-clip",
    "kind": "clip",
    "checksum": "sha256:…",
    "is_image_only": False,
    "max_text_tokens": 77,
    "logit_scale": 100.0,
}
_REQUEST_ID = {"x-request-id": {"description": "the one sent, or a new one", "schema": {"type": "string"}}}
_RETRY_AFTER = {"retry-after": {"description": "seconds", "schema": {"type": "integer"}}}
_SCORING_ERRORS = {
    400: "the form cannot be parsed, or x-request-id is empty, too long or not visible ASCII",
    401: "the API key is missing or wrong",
    408: "the body came too slowly; as plain text: there was no answer in time",
    413: "the body is too large",
    415: "the content type is not one of those read here",
    422: "the request is wrong, or over a limit; `error` names the field and the number",
    429: "this key sends too many requests",
    500: "an error in the service; as plain text: the replica died",
    503: "too many images wait already; as plain text: no replica takes the request",
}
_ALSO_FROM_SERVE = (408, 500, 503)  # as plain text


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {})
        answers[status] = {"model": ErrorAnswer, "description": _SCORING_ERRORS[status], "headers": headers}
        if status in _ALSO_FROM_SERVE:
            answers[status]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return answers


def _header(message: bytes) -> str:
    """Return the header of a safetensors message: the tensors' layout and the JSON `message`."""
    num_bytes = int.from_bytes(message[:8], "little")
    return message[8 : 8 + num_bytes].decode().rstrip()  # spaces align the tensors


def _message(name: str, tensors: str, example: bytes) -> dict[str, Any]:
    """Describe a safetensors body."""
    description = (
        f"A {name}: 8 bytes with the length of the header (little endian), the header (JSON), the tensors' numbers "
        f"(little endian, row by row). Tensors: {tensors}. The other fields are JSON, the string `message` in the "
        "header's `__metadata__`. The example is a header."
    )
    examples = {"header": {"summary": f"the header of a {name}", "value": _header(example)}}
    content = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}, "examples": examples}}
    return {"description": description, "content": content}


_ZERO = np.zeros(1, np.float32)
_PIXELS = np.zeros((1, 3, 64, 64), np.uint8)
_REQUEST = _message(
    "RewardRequest",
    "`images` (batch, 3, height_px, width_px) or, of mixed sizes, `images.0`, `images.1`, … (3, height_px, width_px) "
    "each; U8, where 255 means 1, or F32 or F16 in [0, 1]",
    RewardRequest(
        _PIXELS, (PromptPair("grinning face", "3D", "Flat"),), (0.1,), (WeightedReward("fluent-clip"),)
    ).to_bytes(),
)
_RESPONSE = _message(
    "RewardResponse",
    "F32 `rewards` (batch,), `positive_similarities` and `negative_similarities` (num_rewards, batch); with_gradient: "
    "`image_gradient` or `image_gradient.0`, … in the shapes of the images, of gradient_dtype (F32 or F16)",
    RewardResponse(
        _ZERO, _ZERO[None], _ZERO[None], _PIXELS.astype(np.float32), ("fluent-clip@sha256:…",), "8e1f0f3c5d0c4f2f"
    ).to_bytes(),
)
BINARY_ANSWERS = error_answers(400, 401, 408, 413, 422, 429, 500, 503) | {200: _RESPONSE | {"headers": _REQUEST_ID}}
BINARY_BODY = {"requestBody": _REQUEST | {"required": True}}
JSON_ANSWERS = error_answers(*_SCORING_ERRORS) | {200: {"headers": _REQUEST_ID}}
MODELS_ANSWERS = error_answers(400, 401, 429) | {200: {"content": {JSON_TYPE: {"example": {"models": [_MODEL]}}}}}


def state_answers(status: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that tells the service's state."""
    return error_answers(400) | {200: {"content": {JSON_TYPE: {"example": {"status": status}}}}}


def picture_body(kind: type[PictureRequest], num_images: int, **example: Any) -> dict[str, Any]:
    """Describe the body of /v1/score or /v1/rank, as JSON and as a form, from its class."""
    as_json = kind.model_json_schema()
    images = as_json["properties"]["images"]
    files = images | {"title": "Image", "items": {"type": "string", "format": "binary"}}
    texts = {name: field for name, field in as_json["properties"].items() if name != "images"}
    required = ["image" if name == "images" else name for name in as_json["required"]]
    as_form = as_json | {"properties": {"image": files} | texts, "required": required}
    example = _EXAMPLE | example
    in_form = {"image": [f"{index}.png" for index in range(num_images)]} | example  # files, by their names
    content = {
        JSON_TYPE: {"schema": as_json, "example": example | {"images": [_RED_PIXEL] * num_images}},
        FORM_TYPE: {"schema": as_form, "example": in_form, "encoding": {"image": {"contentType": _PICTURES}}},
    }
    return {"requestBody": {"required": True, "content": content}}
