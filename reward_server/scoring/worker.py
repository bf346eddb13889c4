"""Serve loaded rewards through one async function: batch on the event loop, run torch in a thread of its own.

worker = Worker({"fluent-clip": ClipArgs(kind="clip", path="deploy/tiny/reward")})
response = await worker.score(Job(request, "fluent-clip", request_id="1"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from reward_server.metrics import Record, ignore, phase
from reward_server.models import AnyArgs, ImageOnly
from reward_server.scoring.batching import Batcher
from reward_server.scoring.capacity import largest_batch
from reward_server.scoring.device_share import hold_to_share
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
    # images in one forward, over all callers; a crop counts as an image. auto: measured at start (capacity.py)
    max_batch_images: Positive | Literal["auto"] = 64
    auto_image_px: Positive = 720  # the side of the images with which auto measures
    max_batch_s: Annotated[float, Field(gt=0)] | None = None  # how long a batch may take, by the last one's speed
    max_queued_images: Positive = 512  # images that may wait; a request beyond that gets 503 with Retry-After
    num_cached_texts: Positive = 4096  # of each reward


class Worker:
    """Loads rewards and scores with them; `infos` describes them. Raises WeightsError.

    gpu_share: how much of a card this process may take, as a fraction; 1 where it has one alone, or none.
    """

    def __init__(
        self, rewards: Mapping[str, AnyArgs], args: WorkerArgs, record: Record = ignore, gpu_share: float = 1.0
    ) -> None:
        # One thread: torch parallelizes inside it, the event loop stays free to gather the next batch, and the
        # scorer needs no locks. Torch's thread count holds per thread, hence the initializer.
        self._torch_thread = ThreadPoolExecutor(1, "torch", torch.set_num_threads, (args.torch_threads,))
        self._scorer = self._torch_thread.submit(_load, rewards, args, record, gpu_share).result()
        self._record = record
        self._lost: torch.AcceleratorError | None = None
        most = max(self._scorer.max_images.values(), default=1)
        max_batch_images = most if args.max_batch_images == "auto" else args.max_batch_images
        self._batcher = Batcher(
            self._score_batch, max_batch_images, args.max_queued_images, record, max_batch_s=args.max_batch_s
        )
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

    def check_health(self) -> None:
        """Raise RuntimeError if the device is lost to this process, so that it should be replaced."""
        if self._lost is not None:
            raise RuntimeError(f"the device is lost to this process: {self._lost}")

    async def _score_batch(self, jobs: Sequence[Job]) -> list[Answer]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._torch_thread, self._scorer.score, jobs)
        except torch.AcceleratorError as error:  # CUDA gives it again at each call; lack of memory is none (scorer.py)
            self._lost = error
            raise


def _load(rewards: Mapping[str, AnyArgs], args: WorkerArgs, record: Record, gpu_share: float) -> Scorer:
    """Load the rewards; with `max_batch_images: auto` find out what their devices take."""
    hold_to_share(gpu_share)
    if args.max_batch_images != "auto":
        return Scorer(rewards, args.max_batch_images, args.num_cached_texts, record)
    scorer = Scorer(rewards, num_cached_texts=args.num_cached_texts, record=record)
    for name, reward in scorer.rewards.items():
        scorer.max_images[name] = largest_batch(reward, args.auto_image_px, args.max_queued_images, args.max_batch_s)
    return scorer


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
