"""Score requests of many callers together: group the images that fit into one forward, score, split the answers.

    scorer = Scorer({"fluent-clip": ClipArgs(kind="clip", path="deploy/tiny/reward")})
    (response,) = scorer.score([Job(request, "fluent-clip", request_id="1")])

A job has one reward; combine.py adds several up. Blocking and not thread-safe: worker.py gives it one thread.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import numpy as np
from torch import Tensor

from reward_server.metrics import BATCH_IMAGES, IMAGES, OUT_OF_MEMORY, PHASE_SECONDS, Record, ignore
from reward_server.models import AnyArgs
from reward_server.models.transfer import joined
from reward_server.scoring.combine import NotFinite
from reward_server.scoring.forward import start
from reward_server.scoring.loaded_reward import LoadedReward
from reward_server.scoring.out_of_memory import OutOfMemory, short_of_memory
from reward_server.scoring.parts import CPU, Part, as_images, cat, chunks_of, parts_of
from reward_server.scoring.reward_info import UnknownReward
from services.contract import ContractError, Images, RewardRequest, RewardResponse

# A caller's mistake, or images too large for the device, are an answer of their own, not the end of the others' batch.
Failure = ContractError | OutOfMemory
_FAILURES = (ContractError, OutOfMemory)  # the same, as `except` has it
Answer = RewardResponse | Failure
_Started = Callable[[], list[Tensor]]  # work that a device was asked for: waits for its results and returns them
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One caller's request to one of its rewards, with the id under which it is answered and logged."""

    request: RewardRequest
    reward: str
    request_id: str

    @property
    def num_images(self) -> int:
        return len(self.request.pairs)


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """The result of a part, on the CPU: (batch,) three times, and the gradient in the shape of its images."""

    first: int
    rewards: Tensor
    positive_similarities: Tensor
    negative_similarities: Tensor
    image_gradient: Tensor | None = None


class Scorer:
    """Loads the rewards of this process: `rewards`, by name, in the order of the configuration.

    max_batch_images: views of a forward, the image and its crops. `max_images` says how many images that are for each
    reward; it may be set.
    """

    def __init__(
        self,
        rewards: Mapping[str, AnyArgs],
        max_batch_images: int = 64,
        num_cached_texts: int = 4096,
        record: Record = ignore,
    ) -> None:
        self.rewards = {name: LoadedReward(name, args, num_cached_texts, record) for name, args in rewards.items()}
        self.max_images = {name: max(1, max_batch_images // each.num_views) for name, each in self.rewards.items()}
        self._record = record

    def score(self, jobs: Sequence[Job]) -> list[Answer]:
        """Return one answer per job, in order; weights are not applied, image gradients are float32.

        Images of one size under one reward share forwards, whoever sent them and, if a gradient is requested, in any
        dtype. Without a gradient bytes stay bytes, which models/preprocess.py resizes faster; mixed with floats they
        would have to become floats, and a score would depend on what other callers send.
        """
        outcomes: list[list[_Outcome] | Failure] = [[] for _ in jobs]
        for (name, with_gradient, *_), group in self._groups(jobs, outcomes).items():
            scored = self._score_group(self.rewards[name], with_gradient, group)
            for part, outcome in zip(group, scored, strict=True):
                known = outcomes[part.job]
                if isinstance(outcome, Failure):
                    outcomes[part.job] = outcome
                elif isinstance(known, list):
                    known.append(outcome)
        return [
            outcome if isinstance(outcome, Failure) else self._answer(job, outcome)
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    def bytes_to_shrink(self, job: Job) -> int:
        """Return how many bytes of images `shrunk` could shrink; 0 if it need not be called."""
        reward, request = self.rewards.get(job.reward), job.request
        if reward is None or request.with_gradient or reward.shrink is None:
            return 0
        return sum(image.nbytes for image in request.images if image.dtype == np.uint8)

    def shrunk(self, job: Job) -> Job:
        """Return a job that has `bytes_to_shrink` with its images at the model's size; its answer stays the same.

        May be called from any thread, so that images are resized while the model is busy and all sizes share forwards.
        """
        shrink, images = self.rewards[job.reward].shrink, job.request.images
        assert shrink is not None
        if isinstance(images, np.ndarray):
            smaller: Images = shrink(joined([images], CPU)).numpy()
        else:
            smaller = tuple(
                shrink(joined([each[None]], CPU)).numpy()[0] if each.dtype == np.uint8 else each for each in images
            )
        return replace(job, request=replace(job.request, images=smaller))

    def _groups(
        self, jobs: Sequence[Job], outcomes: list[list[_Outcome] | Failure]
    ) -> dict[tuple[str, bool, bool, tuple[int, ...]], list[Part]]:
        """Group the parts that may share a forward; a job that cannot be scored gets its error as its outcome."""
        groups = defaultdict(list)
        for index, job in enumerate(jobs):
            try:
                with short_of_memory(f"{job.num_images} prompt pairs for reward {job.reward!r}"):
                    prepared = self._reward(job.reward).prepare(job.request.pairs)
            except _FAILURES as error:
                outcomes[index] = error
                continue
            for part in parts_of(index, job.request, prepared):
                with_gradient = job.request.with_gradient
                stay_bytes = part.images.dtype == np.uint8 and not with_gradient
                groups[job.reward, with_gradient, stay_bytes, part.images.shape[1:]].append(part)
        return groups

    def _reward(self, name: str) -> LoadedReward:
        if name not in self.rewards:
            raise UnknownReward(f"reward {name!r} is not served here; served: {', '.join(self.rewards)}")
        return self.rewards[name]

    def _score_group(
        self, reward: LoadedReward, with_gradient: bool, group: list[Part]
    ) -> Sequence[_Outcome | Failure]:
        """Return one outcome for each part."""
        in_chunks = chunks_of(group, self.max_images[reward.name])
        try:
            chunks = list(one_ahead(self._start_in_memory(reward, with_gradient, chunk) for chunk in in_chunks))
        except _FAILURES as error:  # a text is too long for a joint model, or memory lacks: find whose, and for whom
            jobs = [list(parts) for _, parts in groupby(group, key=lambda part: part.job)]
            if len(jobs) == 1:
                return [error] * len(group)
            return [outcome for parts in jobs for outcome in self._score_group(reward, with_gradient, parts)]
        sizes = [len(part.images) for part in group]
        columns = [cat(column).split(sizes) for column in zip(*chunks, strict=True)]
        return [_Outcome(part.first, *row) for part, row in zip(group, zip(*columns, strict=True), strict=True)]

    def _start_in_memory(self, reward: LoadedReward, with_gradient: bool, chunk: list[Part]) -> _Started:
        """Start a chunk; if it does not fit into the device's memory, in halves. Raise OutOfMemory for one image."""
        num_images = sum(len(part.images) for part in chunk)
        height, width = chunk[0].images.shape[-2:]
        what = f"{num_images} images of {width} x {height} pixels for reward {reward.name!r}"
        try:
            with short_of_memory(what):
                return self._start(reward, with_gradient, chunk)
        except OutOfMemory as error:
            self._record(OUT_OF_MEMORY, 1, {"reward": reward.name})
            _log.warning("%s; lower max_batch_images or raise num_gpus", error.reason)
            if num_images == 1:
                raise
        halves = [
            self._start_in_memory(reward, with_gradient, half) for half in chunks_of(chunk, (num_images + 1) // 2)
        ]
        return lambda: [cat(column) for column in zip(*(half() for half in halves), strict=True)]

    def _start(self, reward: LoadedReward, with_gradient: bool, chunk: list[Part]) -> _Started:
        """Ask the device for rewards, positive and negative similarities, and the image gradient if requested.

        Return a function that waits for them and returns them, for all images, on the CPU.
        """
        images = as_images([part.images for part in chunk], reward.device, stay_bytes=not with_gradient)
        prepared = [each for part in chunk for each in part.prepared]
        scales = [scale for part in chunk for scale in part.preference_scales]
        wait, num_images = start(reward, images, prepared, scales, with_gradient), len(images)

        def finish() -> list[Tensor]:
            columns, seconds = wait()
            self._record_chunk(reward.name, num_images, seconds)
            return columns

        return finish

    def _record_chunk(self, reward: str, num_images: int, seconds: Sequence[float]) -> None:
        """Record a forward, and a backward if there was one."""
        for phase, each in zip(("forward", "backward"), seconds, strict=False):
            self._record(PHASE_SECONDS, each, {"phase": phase})
        self._record(IMAGES, num_images, {"reward": reward})
        self._record(BATCH_IMAGES, num_images, {"reward": reward})

    def _answer(self, job: Job, outcomes: list[_Outcome]) -> Answer:
        outcomes = sorted(outcomes, key=lambda outcome: outcome.first)
        for outcome in outcomes:
            if (index := _first_not_finite(outcome)) is not None:
                pair = job.request.pairs[outcome.first + index]
                return NotFinite(
                    f"images[{outcome.first + index}] has no finite {job.reward} reward or gradient under {pair}"
                )
        return RewardResponse(
            rewards=cat([each.rewards for each in outcomes]).numpy(),
            positive_similarities=cat([each.positive_similarities for each in outcomes]).numpy()[None],
            negative_similarities=cat([each.negative_similarities for each in outcomes]).numpy()[None],
            image_gradient=_image_gradient(job.request, outcomes),
            scorers=(self.rewards[job.reward].version,),
            request_id=job.request_id,
        )


def one_ahead(started: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """Wait for each piece of work after the next one was started: a device never waits for the CPU in between."""
    waiting: Callable[[], _T] | None = None
    for each in started:
        if waiting is not None:
            yield waiting()
        waiting = each
    if waiting is not None:
        yield waiting()


def _image_gradient(request: RewardRequest, outcomes: list[_Outcome]) -> Images | None:
    """Return the gradient in the layout of the request's images."""
    gradients = [each.image_gradient.numpy() for each in outcomes if each.image_gradient is not None]
    if not gradients:
        return None
    return gradients[0] if isinstance(request.images, np.ndarray) else tuple(gradient[0] for gradient in gradients)


def _first_not_finite(outcome: _Outcome) -> int | None:
    """Return the first image whose reward or gradient is not finite. A sum tells, in one pass over the gradient."""
    checks = outcome.rewards
    if outcome.image_gradient is not None:
        checks = checks + outcome.image_gradient.sum(dim=(1, 2, 3))
    bad = (~checks.isfinite()).nonzero()
    return int(bad[0]) if len(bad) else None
