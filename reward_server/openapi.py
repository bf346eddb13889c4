"""What FastAPI cannot see for itself: bodies that the routes read on their own, examples, and all errors."""

from __future__ import annotations

from typing import Any

from reward_server.errors import ErrorAnswer
from reward_server.questions import FORM_TYPE, JSON_TYPE, Question
from services.contract import MEDIA_TYPE

TITLE = "srpo-ray reward service"
DESCRIPTION = """
Rewards of images under text-conditioned prompt pairs (SRPO, arXiv 2509.06942), and their gradients.

`POST /v1/score` and `POST /v1/rank` are for people: PNG, JPEG or WebP in, JSON out. `POST /v1/rewards` is for
programs: safetensors in both directions, as `services/contract.py` defines them. Every error is
`{"error", "request_id"}`; 429 and 503 say in `retry-after` when to come back. An `idempotency-key` makes a retried
request get the stored answer.
"""
_RED_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
_PICTURES = "image/png, image/jpeg, image/webp"
_EXAMPLE = {"prompt": "grinning face", "positive": "3D", "negative": "Flat", "preference_scale": 0.1}
_REQUEST_ID = {"x-request-id": {"description": "sent or made up", "schema": {"type": "string"}}}
_RETRY_AFTER = {"retry-after": {"description": "seconds", "schema": {"type": "integer"}}}
_BINARY = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
_SCORING_ERRORS = {
    400: "the form cannot be parsed",
    401: "the API key is missing or wrong",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the content type is not one of those read here",
    422: "the request is wrong, or over a limit; `error` names the field and the number",
    429: "this key asks too often",
    500: "a fault of the service",
    503: "too much waits already",
}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {})
        answers[status] = {"model": ErrorAnswer, "description": _SCORING_ERRORS[status], "headers": headers}
    return answers


BINARY_ANSWERS = error_answers(401, 408, 413, 422, 429, 500, 503) | {
    200: _BINARY | {"description": "a RewardResponse", "headers": _REQUEST_ID}
}
BINARY_BODY = {"requestBody": _BINARY | {"required": True, "description": "a RewardRequest"}}
JSON_ANSWERS = error_answers(*_SCORING_ERRORS) | {200: {"headers": _REQUEST_ID}}
MODELS_ANSWERS = error_answers(401, 429)


def question_body(kind: type[Question], num_images: int, **example: Any) -> dict[str, Any]:
    """The two forms of a question, described from its class."""
    as_json = kind.model_json_schema()
    images = as_json["properties"]["images"]
    files = images | {"title": "Image", "items": {"type": "string", "format": "binary"}}
    texts = {name: field for name, field in as_json["properties"].items() if name != "images"}
    required = ["image" if name == "images" else name for name in as_json["required"]]
    as_form = as_json | {"properties": {"image": files} | texts, "required": required}
    example = _EXAMPLE | example | {"images": [_RED_PIXEL] * num_images}
    content = {
        JSON_TYPE: {"schema": as_json, "example": example},
        FORM_TYPE: {"schema": as_form, "encoding": {"image": {"contentType": _PICTURES}}},
    }
    return {"requestBody": {"required": True, "content": content}}
