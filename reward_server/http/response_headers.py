"""Add the request's id and security headers to every answer, and count failed requests.

Outside the access checks, so that their answers have the headers too, and inside the access log.
"""

from __future__ import annotations

import re
import uuid
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.metrics import REJECTS, Record
from services.contract import REQUEST_ID_HEADER

_PLAIN_ID = re.compile("[!-~]{1,128}")  # short and visible: the same in a header, an answer and a log
_REFUSAL = f"{REQUEST_ID_HEADER} must be 1 to 128 visible ASCII characters; without one, the service makes an id"
# The page shows a picture from the user's disk (blob:) and has its icon in a data: URL; the rest is our own.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class ResponseHeaders:
    """Gives every request its id before the app sees it: the caller's own, or a new one.

    An id with other characters than visible ASCII gets 400. It cannot be replaced: Serve adds its own header with the
    id as it was sent.
    """

    def __init__(self, app: ASGIApp, record: Record) -> None:
        self._app, self._record = app, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID_HEADER)
        is_refused = sent is not None and _PLAIN_ID.fullmatch(sent) is None
        request_id = uuid.uuid4().hex if sent is None or is_refused else sent
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message), request_id)
                count_reject(self._record, message["status"], scope["state"])
            await send(message)

        if is_refused:
            scope["state"]["reject_reason"] = "request_id"
            answer = {"error": _REFUSAL, "request_id": request_id}
            await JSONResponse(answer, HTTPStatus.BAD_REQUEST)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)


def add_headers(headers: MutableHeaders, request_id: str) -> None:
    headers[REQUEST_ID_HEADER] = request_id
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)


def count_reject(record: Record, status: int, state: dict[str, Any]) -> None:
    """Count a failed request under the `reject_reason` in its state, or else under its status."""
    if status >= HTTPStatus.BAD_REQUEST:
        reason = state.setdefault("reject_reason", HTTPStatus(status).phrase.lower().replace(" ", "_"))
        record(REJECTS, 1, {"reason": reason})
