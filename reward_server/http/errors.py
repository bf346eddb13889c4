"""Turn every exception into the same small JSON, {error, request_id}, that says what the caller can do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from reward_server.http.response_headers import add_headers, count_reject
from reward_server.metrics import Record
from reward_server.scoring.batching import Overloaded
from services.contract import ContractError

_MAX_CHARS = 1000  # the name of an unknown field is the caller's text
_log = logging.getLogger(__name__)


class ErrorAnswer(BaseModel):
    error: str = Field(examples=["images[0] is damaged or incomplete (OSError)"])
    request_id: str = Field(examples=["8e1f0f3c5d0c4f2f9a59b7f9d4c1d5aa"])


def handle_errors(app: FastAPI, record: Record) -> None:
    """Register what each exception is answered with, and count it."""

    async def contract_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ContractError)
        request.state.reject_reason = error.reason
        return _answer(request, HTTPStatus.UNPROCESSABLE_ENTITY, str(error))

    async def header_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _answer(request, HTTPStatus.UNPROCESSABLE_ENTITY, validation_text(error.errors()))

    async def overloaded(request: Request, error: Exception) -> Response:
        assert isinstance(error, Overloaded)
        request.state.reject_reason = "overloaded"
        return _answer(request, HTTPStatus.SERVICE_UNAVAILABLE, str(error), {"retry-after": str(error.retry_after_s)})

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _answer(request, error.status_code, error.detail, error.headers)

    async def internal_error(request: Request, error: Exception) -> Response:
        """Answer outside all middleware, which the exception has already passed; so add headers and count here."""
        fields = {"request_id": request.state.request_id}
        _log.error("request failed", exc_info=error, extra={"fields": fields})
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        answer = _answer(request, status, "internal error; the service's log names the cause")
        add_headers(answer.headers, request.state.request_id)
        count_reject(record, status, request.scope["state"])
        return answer

    app.add_exception_handler(ContractError, contract_error)
    app.add_exception_handler(RequestValidationError, header_error)
    app.add_exception_handler(Overloaded, overloaded)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, internal_error)


def validation_text(errors: object) -> str:
    """Return pydantic's list of errors as "field: problem; …", without the values."""
    assert isinstance(errors, list | tuple)
    return "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors[:5])[:_MAX_CHARS]


def _answer(request: Request, status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    answer = ErrorAnswer(error=text, request_id=request.state.request_id)
    return JSONResponse(answer.model_dump(), status_code=status, headers=headers)
