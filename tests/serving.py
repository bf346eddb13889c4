"""The reward app on a real socket without Ray: uvicorn in a thread, on a port that the system chooses.

with serve_app(reward_app(Worker({"tiny-clip": ClipArgs(kind="clip", path=folder)}, WorkerArgs()))) as url: ...
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.scoring.combine import score_all
from reward_server.scoring.scorer import Job
from reward_server.scoring.worker import Worker
from services.contract import RewardRequest, RewardResponse

LIMITS = Limits()


def reward_app(worker: Worker, limits: Limits = LIMITS, keys: Collection[str] = ()) -> FastAPI:
    """The app of the deployment, with the rewards of a worker in this process."""

    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        return await score_all(request, lambda reward: worker.score(Job(request, reward, request_id)))

    return build_app(score, worker.infos, limits, keys)


@contextmanager
def serve_app(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """The URL of `app`; connections wait in the socket's backlog until the server's loop runs, so nothing polls."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
