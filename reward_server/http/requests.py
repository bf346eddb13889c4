"""Read requests to /v1/score and /v1/rank: pictures with a prompt and two control words, as JSON or as a form."""

from __future__ import annotations

import asyncio
import base64
import json
from reprlib import repr as shown
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.status import HTTP_415_UNSUPPORTED_MEDIA_TYPE
from starlette.types import Message, Receive

from reward_server.http.errors import validation_text
from reward_server.http.limits import Limits
from reward_server.scoring.threads import in_thread_if_large
from services.contract import ContractError, PromptPair, RewardRequest, WeightedReward
from services.pictures import open_picture, read_pixels

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
_MAX_FORM_FIELDS = 32  # more than there are fields; an unknown or repeated one is an error of its own
_MAX_JSON_PARTS = 20_000  # a list of empty lists takes 20 times its text in memory
_PIECE_BYTES = 64 << 10  # of a form, parsed in one go: a millisecond or less

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Picture = Annotated[
    bytes, WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"})
]


class PictureRequest(BaseModel):
    """The fields that /v1/score and /v1/rank have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    images: list[Picture] = Field(min_length=1, description="complete PNG, JPEG or WebP files")
    prompt: Text = Field(description="what the pictures show, without control words", examples=["grinning face"])
    positive: Text = Field(description="the wanted control word", examples=["3D"])
    negative: Text = Field(description="the unwanted control word", examples=["Flat"])
    preference_scale: float = Field(
        default=0.0, allow_inf_nan=False, description="k in (1 + k) · positive − negative", examples=[0.1]
    )
    reward: Text | None = Field(default=None, description="required if several rewards are served", examples=[None])

    def to_reward_request(
        self, reward: str, images: tuple[NDArray[np.uint8], ...], with_gradient: bool
    ) -> RewardRequest:
        pair = PromptPair(self.prompt, self.positive, self.negative)
        return RewardRequest(
            images=images,
            pairs=(pair,) * len(images),
            preference_scales=(self.preference_scale,) * len(images),
            rewards=(WeightedReward(reward),),
            with_gradient=with_gradient,
        )


class ScoreRequest(PictureRequest):
    with_heat_map: bool = Field(default=False, description="also return a heat map of each picture")


class RankRequest(PictureRequest):
    images: list[Picture] = Field(min_length=2, description="complete PNG, JPEG or WebP files")
    temperature: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="of the probabilities; default: 1 / logit_scale of the reward, if it has one",
        examples=[0.01],
    )


RequestT = TypeVar("RequestT", ScoreRequest, RankRequest)


async def read_fields(request: Request, body: bytes, kind: type[RequestT], limits: Limits) -> RequestT:
    """Read the fields of a body.

    Raise ContractError naming a wrong field, HTTPException 415 for another content type and 400 for a broken form.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON_TYPE:  # its bytes take four times as long as those of a binary message
        return _validate(kind, await in_thread_if_large(4 * len(body), _read_json, body), is_strict=True)
    if media_type == FORM_TYPE:
        return _validate(kind, await _read_form(request, body, limits), is_strict=False)
    error = f"content-type must be {JSON_TYPE} or {FORM_TYPE}, not {shown(media_type)}"
    raise HTTPException(HTTP_415_UNSUPPORTED_MEDIA_TYPE, error)


def read_pictures(pictures: list[bytes], limits: Limits) -> tuple[NDArray[np.uint8], ...]:
    """Decode pictures, (3, height_px, width_px) each. Raise ContractError before decoding one too many or too large."""
    limits.check_num_images(len(pictures))
    opened = [open_picture(data, f"images[{index}]") for index, data in enumerate(pictures)]
    limits.check_images([(picture.height, picture.width) for picture in opened])
    return tuple(read_pixels(picture, f"images[{index}]") for index, picture in enumerate(opened))


def _read_json(body: bytes) -> object:
    if (num_parts := sum(map(body.count, (b",", b"[", b"{")))) > _MAX_JSON_PARTS:  # base64 has none of these
        raise ContractError(f"body has {num_parts} commas and opening brackets; at most {_MAX_JSON_PARTS} are allowed")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"body is not JSON: {error}") from error
    if isinstance(fields, dict) and isinstance(fields.get("images"), list):
        fields["images"] = [_from_base64(text, f"images[{index}]") for index, text in enumerate(fields["images"])]
    return fields


def _from_base64(text: object, name: str) -> bytes:
    if not isinstance(text, str):
        raise ContractError(f"{name} must be a string in base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ContractError(f"{name} is not base64: {error}") from error


async def _read_form(request: Request, body: bytes, limits: Limits) -> dict[str, Any]:
    """Return the form's text fields, and as `images` the files of its field `image`."""
    parser = Request(request.scope, _in_pieces(body))
    try:
        form = await parser.form(max_files=limits.max_images, max_fields=_MAX_FORM_FIELDS)
    except HTTPException as error:
        if error.detail.startswith("Too many files"):  # starlette has no class for it
            raise limits.too_many_images(f"more than {limits.max_images}") from error
        raise
    except ValueError as error:  # a charset that Python knows and cannot decode with, such as "undefined"
        raise ContractError(f"the form cannot be read in the charset of its content-type: {error}") from error
    try:
        return await _form_fields(form)
    finally:
        await form.close()


def _in_pieces(body: bytes) -> Receive:
    """Return the body in pieces, as from a network, so that other callers get their turn while it is parsed."""
    starts = iter(range(0, max(len(body), 1), _PIECE_BYTES))

    async def receive() -> Message:
        await asyncio.sleep(0)
        end = next(starts) + _PIECE_BYTES
        return {"type": "http.request", "body": body[end - _PIECE_BYTES : end], "more_body": end < len(body)}

    return receive


async def _form_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {"images": []}
    for name, value in form.multi_items():
        if (name == "image") == isinstance(value, str):
            raise ContractError(
                f"form field {shown(name)}: send pictures as files named 'image', and all other fields as text"
            )
        if not isinstance(value, str):
            fields["images"].append(await value.read())
        elif name in fields:
            raise ContractError(f"form field {shown(name)} is unknown or given twice")
        else:
            fields[name] = value
    return fields


def _validate(kind: type[RequestT], fields: object, is_strict: bool) -> RequestT:
    """Check types strictly for JSON; a form has only text."""
    try:
        return kind.model_validate(fields, strict=is_strict)
    except ValidationError as error:
        raise ContractError(validation_text(error.errors())) from error
