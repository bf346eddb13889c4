"""Log one line of JSON for each request, and for all else the service logs; no text of a caller can forge a line.

    log_as_json(sys.stderr)         # once a process: all that the package reward_server logs
    app.add_middleware(AccessLog)   # {"message": "request", "request_id": "…", "route": "/v1/rewards", "status": 200 …}

A line has the id, the route (not the path, which is the caller's text), status, seconds, bytes, the key's fingerprint
and, if the app has put them into the request's state, `rewards` (names that are served), `num_images` and
`reject_reason`. Never a key, a prompt, an address or a pixel.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FROM_STATE = ("request_id", "key_fingerprint", "rewards", "num_images", "reject_reason")
_log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON; `extra={"fields": {...}}` adds members. All but ASCII is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json(stream: TextIO) -> logging.Handler:
    """Write what the package reward_server logs, from INFO up, to `stream` and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    package = logging.getLogger("reward_server")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)
    return handler


@dataclass(slots=True)
class _Traffic:
    """What was counted of one request."""

    status: int | None = None  # None until the answer begins: a caller who hung up got none
    bytes_in: int = 0
    bytes_out: int = 0


class AccessLog:
    """Logs each request when its answer is sent or when it failed, which is answered with 500 further out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, traffic = time.monotonic(), _Traffic()

        async def counted_receive() -> Message:
            message = await receive()
            traffic.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            traffic.status = message.get("status", traffic.status)
            traffic.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:  # raised again, to be answered with 500; a caller who hung up raises none
            traffic.status = 500
            raise
        finally:
            _log.info("request", extra={"fields": _fields(scope, traffic, time.monotonic() - began_s)})


def _fields(scope: Scope, traffic: _Traffic, seconds: float) -> dict[str, Any]:
    state = scope.get("state", {})
    known = {name: state[name] for name in _FROM_STATE if name in state}
    route = getattr(scope.get("route"), "path", None)  # set where the path is one of the app's
    return known | {"method": scope["method"], "route": route} | asdict(traffic) | {"seconds": round(seconds, 4)}
