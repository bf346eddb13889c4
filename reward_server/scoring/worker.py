"""Serve loaded rewards through one async function: batch on the event loop, run torch in a thread of its own.

worker = Worker({"fluent-clip": ClipArgs(kind="clip", path="deploy/tiny/reward")})
response = await worker.score(Job(request, "fluent-clip", request_id="1"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from reward_server.metrics import Record, ignore, phase
from reward_server.models import AnyArgs, ImageOnly
from reward_server.scoring.batching import Batcher
from reward_server.scoring.loaded_reward import LoadedReward
from reward_server.scoring.reward_info import RewardInfo
from reward_server.scoring.scorer import Answer, Failure, Job, Scorer
from reward_server.scoring.threads import in_thread_if_large
from services.contract import RewardResponse

Positive = Annotated[int, Field(gt=0)]


class WorkerArgs(BaseModel):
    """Settings of a process that holds models; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    torch_threads: Positive = 1
    max_batch_images: Positive = 64  # images in one forward, over all callers; a crop counts as an image
    max_queued_images: Positive = 512  # images that may wait; a request beyond that gets 503 with Retry-After
    num_cached_texts: Positive = 4096  # of each reward


class Worker:
    """Loads rewards and scores with them; `infos` describes them. Raises WeightsError."""

    def __init__(self, rewards: Mapping[str, AnyArgs], args: WorkerArgs, record: Record = ignore) -> None:
        # One thread: torch parallelizes inside it, the event loop stays free to gather the next batch, and the
        # scorer needs no locks. Torch's thread count holds per thread, hence the initializer.
        self._torch_thread = ThreadPoolExecutor(1, "torch", torch.set_num_threads, (args.torch_threads,))
        loading = self._torch_thread.submit(Scorer, rewards, args.max_batch_images, args.num_cached_texts, record)
        self._scorer = loading.result()
        self._record = record
        self._batcher = Batcher(self._score_batch, args.max_batch_images, args.max_queued_images, record)
        self.infos = {name: _info(served, rewards[name].kind) for name, served in self._scorer.rewards.items()}

    async def score(self, job: Job) -> RewardResponse:
        """Score one job. Raise ContractError if it cannot be scored, Overloaded if too many wait or memory lacks."""
        if num_bytes := self._scorer.bytes_to_shrink(job):
            with phase(self._record, "resize"):
                job = await in_thread_if_large(num_bytes, self._scorer.shrunk, job)
        answer = await self._batcher.submit(job)
        if isinstance(answer, Failure):
            raise answer
        return answer

    async def _score_batch(self, jobs: Sequence[Job]) -> list[Answer]:
        return await asyncio.get_running_loop().run_in_executor(self._torch_thread, self._scorer.score, jobs)


def _info(served: LoadedReward, kind: str) -> RewardInfo:
    model = served.model
    return RewardInfo(
        name=served.name,
        kind=kind,
        checksum=model.checksum,
        is_image_only=isinstance(model, ImageOnly),
        max_text_tokens=None if isinstance(model, ImageOnly) else model.max_text_tokens,
        logit_scale=model.logit_scale,
    )
