"""Stand between trainer and reward service: pass requests on, fail for a while, or spoil one gradient.

with Proxy("http://127.0.0.1:8000") as proxy:
    proxy.url
    proxy.is_away = True          # connections are refused with 503, as while a service restarts
    proxy.spoil_next_gradient()   # one answer's gradient is so large that the training's overflows
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
import requests

from services.contract import MEDIA_TYPE, RewardResponse

_HUGE = 1e30  # finite, as answers must be; its square is not
_TIMEOUT_S = 120
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "host", "keep-alive", "date", "server"}


class Proxy:
    """A proxy on a free port of this machine, which ends with the context."""

    def __init__(self, target: str) -> None:
        self.target, self.is_away, self.num_spoiled = target, False, 0
        self._spoils = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_POST(self) -> None:
                proxy.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spoil_next_gradient(self) -> None:
        """Let the next answer with a gradient have one that overflows."""
        self._spoils.set()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        if self.is_away:
            self._send(handler, 503, {}, b"")
            return
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP_HEADERS}
        try:
            answer = requests.request(
                handler.command, self.target + handler.path, data=body, headers=headers, timeout=_TIMEOUT_S
            )
        except requests.RequestException:
            self._send(handler, 502, {}, b"")
            return
        content = answer.content
        if self._spoils.is_set() and answer.ok and answer.headers.get("content-type") == MEDIA_TYPE:
            content = self._spoiled(content)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_HEADERS}
        self._send(handler, answer.status_code, kept, content)

    def _spoiled(self, content: bytes) -> bytes:
        response = RewardResponse.from_bytes(content)
        if not isinstance(response.image_gradient, np.ndarray):
            return content
        self._spoils.clear()
        self.num_spoiled += 1
        response.image_gradient[:] = _HUGE
        return response.to_bytes()

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
