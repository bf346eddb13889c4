"""The reward service on Ray Serve: one deployment that holds the models and the HTTP app in one process.

A request crosses a single hop, proxy to replica; inside it waits a few milliseconds for others to share its forward.
`build` is the import path of deploy/serve.yaml, whose `args` are ServiceArgs.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from reward_server.app import build_app
from reward_server.models import RewardArgs
from reward_server.scorer import Answer, Job, Scorer
from services.contract import ContractError, RewardRequest, RewardResponse

Positive = Annotated[int, Field(gt=0)]


class ServiceArgs(BaseModel):
    """`args` in deploy/serve.yaml; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rewards: Annotated[dict[str, RewardArgs], Field(min_length=1)]  # the name that requests use -> what to load
    torch_threads: Positive = 1
    max_batch_images: Positive = 64  # images in one forward, over all callers
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.005  # how long the first caller waits for company
    num_cached_texts: Positive = 4096
    max_body_bytes: Positive = 256 * 2**20


def build(args: dict[str, Any]) -> Application:
    """The Serve application. Raises pydantic's ValidationError naming the key that is unknown or wrong."""
    return RewardService.bind(ServiceArgs.model_validate(args))  # type: ignore[attr-defined]  # serve.deployment adds it


def _num_images(jobs: list[Job]) -> int:
    """The size of a batch. Serve refuses a job larger than a batch; ours is scored, alone and in several forwards."""
    return sum(job.num_images for job in jobs) if len(jobs) > 1 else 1


@serve.deployment
@serve.ingress()
class RewardService:
    """Loads the models in the replica, then serves them; `__serve_build_asgi_app__` is Serve's late-bound hook."""

    def __init__(self, args: ServiceArgs) -> None:
        self._args = args
        # One thread: torch parallelises inside it, the event loop stays free to gather the next batch, and the
        # scorer needs no locks. Torch's thread count holds per thread, hence the initializer.
        self._torch_thread = ThreadPoolExecutor(1, "torch", torch.set_num_threads, (args.torch_threads,))
        self._scorer = self._torch_thread.submit(
            Scorer, args.rewards, args.max_batch_images, args.num_cached_texts
        ).result()
        self._score_batch.set_max_batch_size(args.max_batch_images)
        self._score_batch.set_batch_wait_timeout_s(args.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.score, self._scorer.versions, self._args.max_body_bytes)

    async def score(self, request: RewardRequest, request_id: str) -> RewardResponse:
        answer: Answer = await self._score_batch(Job(request, request_id))
        if isinstance(answer, ContractError):
            raise answer
        return answer

    @serve.batch(batch_size_fn=_num_images)
    async def _score_batch(self, jobs: list[Job]) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._torch_thread, self._scorer.score, jobs)
