"""The reward app on a real socket without Ray: uvicorn in a thread, on a port that the system chooses.

with serve_app(reward_app(Scorer(rewards))) as url: ...
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from reward_server.app import build_app
from reward_server.scorer import Job, Scorer
from services.contract import ContractError, RewardRequest, RewardResponse


def reward_app(scorer: Scorer, max_body_bytes: int = 64 << 20) -> FastAPI:
    """The app of the deployment, around a scorer in a thread of this process; no batches over callers."""
    torch_thread = ThreadPoolExecutor(1, "torch")

    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        loop = asyncio.get_running_loop()
        (answer,) = await loop.run_in_executor(torch_thread, scorer.score, [Job(request, request_id)])
        if isinstance(answer, ContractError):
            raise answer
        return answer

    return build_app(score, scorer.versions, max_body_bytes)


@contextmanager
def serve_app(app: ASGIApp) -> Iterator[str]:
    """The URL of `app`; connections wait in the socket's backlog until the server's loop runs, so nothing polls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
