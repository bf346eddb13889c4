"""What people send: pictures with a prompt and two control words, as JSON or as a form, read into one request."""

from __future__ import annotations

import base64
import json
from reprlib import repr as shown
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.status import HTTP_415_UNSUPPORTED_MEDIA_TYPE
from starlette.types import Message

from reward_server.errors import validation_text
from reward_server.limits import Limits
from reward_server.off_loop import off_loop_if_large
from services.contract import ContractError, PromptPair, RewardRequest, WeightedReward
from services.pictures import open_picture, read_pixels

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
_MAX_FORM_FIELDS = 32  # more than there are names; the rest is an error of its own

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Picture = Annotated[
    bytes, WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"})
]


class Question(BaseModel):
    """What the routes for people have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    images: list[Picture] = Field(min_length=1, description="whole PNG, JPEG or WebP files")
    prompt: Text = Field(description="what the pictures show, without control words", examples=["grinning face"])
    positive: Text = Field(description="control word that is wanted", examples=["3D"])
    negative: Text = Field(description="control word that is to be avoided", examples=["Flat"])
    preference_scale: float = Field(
        default=0.0, allow_inf_nan=False, description="k in (1 + k) · positive − negative", examples=[0.1]
    )
    reward: Text | None = Field(default=None, description="needed where several are served", examples=[None])

    def request(self, reward: str, images: tuple[NDArray[np.uint8], ...], with_gradient: bool) -> RewardRequest:
        pair = PromptPair(self.prompt, self.positive, self.negative)
        return RewardRequest(
            images=images,
            pairs=(pair,) * len(images),
            preference_scales=(self.preference_scale,) * len(images),
            rewards=(WeightedReward(reward),),
            with_gradient=with_gradient,
        )


class ScoreQuestion(Question):
    with_heat_map: bool = Field(default=False, description="also where in each picture the reward wants change")


class RankQuestion(Question):
    images: list[Picture] = Field(min_length=2, description="whole PNG, JPEG or WebP files")
    temperature: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="of the probabilities; left out: 1 / logit_scale of the reward, where it has one",
        examples=[0.01],
    )


Asked = TypeVar("Asked", ScoreQuestion, RankQuestion)


async def read_question(request: Request, body: bytes, kind: type[Asked], limits: Limits) -> Asked:
    """Raises ContractError naming the field, or HTTPException 415 for another content type, 400 for a broken form."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON_TYPE:  # whose bytes take four times as long as those of a binary message
        return _validate(kind, await off_loop_if_large(4 * len(body), _read_json, body), is_strict=True)
    if media_type == FORM_TYPE:
        return _validate(kind, await _read_form(request, body, limits.max_images), is_strict=False)
    error = f"content-type must be {JSON_TYPE} or {FORM_TYPE}, not {shown(media_type)}"
    raise HTTPException(HTTP_415_UNSUPPORTED_MEDIA_TYPE, error)


def read_pictures(pictures: list[bytes], limits: Limits) -> tuple[NDArray[np.uint8], ...]:
    """(3, height_px, width_px) each. Raises ContractError; what is too large is not decoded."""
    opened = [open_picture(data, f"images[{index}]") for index, data in enumerate(pictures)]
    limits.check_images([(picture.height, picture.width) for picture in opened])
    return tuple(read_pixels(picture, f"images[{index}]") for index, picture in enumerate(opened))


def _read_json(body: bytes) -> object:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"body is not JSON: {error}") from error
    if isinstance(fields, dict) and isinstance(fields.get("images"), list):
        fields["images"] = [_from_base64(text, f"images[{index}]") for index, text in enumerate(fields["images"])]
    return fields


def _from_base64(text: object, name: str) -> bytes:
    if not isinstance(text, str):
        raise ContractError(f"{name} must be a text in base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ContractError(f"{name} is not base64: {error}") from error


async def _read_form(request: Request, body: bytes, max_images: int) -> dict[str, Any]:
    """The form's texts, and as `images` the files of its field `image`."""

    async def whole_body() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    fields: dict[str, Any] = {"images": []}
    parser = Request(request.scope, whole_body)
    async with parser.form(max_files=max_images, max_fields=_MAX_FORM_FIELDS) as form:
        for name, value in form.multi_items():
            if (name == "image") == isinstance(value, str):
                raise ContractError(f"form field {shown(name)}: pictures are files named 'image', all else is text")
            if not isinstance(value, str):
                fields["images"].append(await value.read())
            elif name in fields:
                raise ContractError(f"form field {shown(name)} is unknown or given twice")
            else:
                fields[name] = value
    return fields


def _validate(kind: type[Asked], fields: object, is_strict: bool) -> Asked:
    """Strict for JSON, which has types; a form has only texts."""
    try:
        return kind.model_validate(fields, strict=is_strict)
    except ValidationError as error:
        raise ContractError(validation_text(error.errors())) from error
