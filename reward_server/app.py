"""The HTTP face of the reward service: routes, limits, errors. Knows neither torch nor ray.

Whatever scores is handed in as one async function, so the same app runs under Ray Serve, uvicorn and in tests.
Every answer carries an x-request-id (the caller's own if it sent a plain one); every error is {error, request_id}.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.status import (
    HTTP_413_CONTENT_TOO_LARGE,
    HTTP_422_UNPROCESSABLE_CONTENT,
    HTTP_500_INTERNAL_SERVER_ERROR,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contract import (
    MEDIA_TYPE,
    MODELS_PATH,
    READY_PATH,
    REWARDS_PATH,
    ContractError,
    RewardRequest,
    RewardResponse,
)

Score = Callable[[RewardRequest, str], Awaitable[RewardResponse]]  # request, request id; may raise ContractError

REQUEST_ID_HEADER = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # anything else could forge lines in a log
_log = logging.getLogger(__name__)


class ServedReward(BaseModel):
    name: str
    checksum: str  # of the weights, "sha256:…"


class ServedRewards(BaseModel):
    models: list[ServedReward]


class Status(BaseModel):
    status: str


class ErrorAnswer(BaseModel):
    error: str
    request_id: str


_BINARY = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


def build_app(score: Score, versions: Mapping[str, str], max_body_bytes: int) -> FastAPI:
    """The application. `versions`: the served rewards, name -> checksum of the weights."""
    app = FastAPI(title="srpo-ray reward service", responses={422: {"model": ErrorAnswer}})
    app.add_middleware(_RequestId)
    app.add_exception_handler(ContractError, _contract_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    @app.post(
        REWARDS_PATH,
        response_class=Response,
        responses={200: _BINARY, 413: {"model": ErrorAnswer}},
        openapi_extra={"requestBody": _BINARY | {"required": True}},
    )
    async def rewards(request: Request) -> Response:
        """Rewards of images under their prompt pairs and, on request, the gradient with respect to the images.

        Body and answer are safetensors messages; services/contract.py defines them.
        """
        asked = RewardRequest.from_bytes(await _read_body(request, max_body_bytes))
        answered = await score(asked, request.state.request_id)
        return Response(answered.to_bytes(), media_type=MEDIA_TYPE)

    @app.get(MODELS_PATH)
    async def models() -> ServedRewards:
        """The rewards that may be asked for."""
        return ServedRewards(models=[ServedReward(name=name, checksum=sha) for name, sha in versions.items()])

    @app.get("/healthz")
    async def health() -> Status:
        """The process answers."""
        return Status(status="alive")

    @app.get(READY_PATH)
    async def ready() -> Status:
        """The weights are loaded: this app is built only after them."""
        return Status(status="ready")

    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, never holding more than max_bytes of it: a missing or wrong content-length does not help."""
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_bytes:
            raise HTTPException(HTTP_413_CONTENT_TOO_LARGE, f"body is larger than {max_bytes} bytes; send fewer images")
        body += chunk
    return bytes(body)


class _RequestId:
    """Gives every request its id before anything else sees it, and every answer the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Request(scope).headers.get(REQUEST_ID_HEADER, "")
        request_id = sent if _PLAIN_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


async def _contract_error(request: Request, error: Exception) -> Response:
    return _error_answer(request, HTTP_422_UNPROCESSABLE_CONTENT, str(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error_answer(request, error.status_code, error.detail)


async def _internal_error(request: Request, error: Exception) -> Response:
    _log.error("request %s failed", request.state.request_id, exc_info=error)
    return _error_answer(request, HTTP_500_INTERNAL_SERVER_ERROR, "internal error; the service's log names the cause")


def _error_answer(request: Request, status: int, text: str) -> Response:
    request_id = request.state.request_id
    answer = ErrorAnswer(error=text, request_id=request_id).model_dump()
    return JSONResponse(answer, status_code=status, headers={REQUEST_ID_HEADER: request_id})
