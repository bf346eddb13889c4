"""Requests of many callers in, their answers out: validate, group what fits into one forward, score, split again.

    scorer = Scorer({"fluent-clip": ClipArgs(kind="clip", path="deploy/tiny/reward")})
    (response,) = scorer.score([Job(request, request_id="1")])

Blocking and not thread-safe: whoever serves it gives it one thread (deployment.py).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reward_server.models import ClipArgs, Hpsv2Args, RewardModel, load_reward
from reward_server.srp import PairReward, value, value_and_image_gradient
from services.contract import ContractError, Float32, RewardRequest, RewardResponse

Answer = RewardResponse | ContractError  # a caller's mistake is its own answer, not the end of the others' batch


@dataclass(frozen=True, slots=True)
class Job:
    """One caller's request with the id under which it is answered and logged."""

    request: RewardRequest
    request_id: str

    @property
    def num_images(self) -> int:
        return len(self.request.pairs)


class Scorer:
    """The served rewards, loaded. `versions`: name -> checksum of the weights, in the order of the configuration."""

    def __init__(
        self, rewards: Mapping[str, ClipArgs | Hpsv2Args], max_batch_images: int = 64, num_cached_texts: int = 4096
    ) -> None:
        self._rewards = {name: _Served(load_reward(args), num_cached_texts) for name, args in rewards.items()}
        self._max_batch_images = max_batch_images
        self.versions = {name: served.model.checksum for name, served in self._rewards.items()}

    def score(self, jobs: Sequence[Job]) -> list[Answer]:
        """One answer per job, in order. Images of one size under one reward share forwards, whoever sent them."""
        answers: dict[int, Answer] = {}
        groups: dict[tuple[object, ...], dict[int, _Prepared]] = defaultdict(dict)
        for index, job in enumerate(jobs):
            try:
                request = job.request
                prepared = self._prepare(job)
                groups[request.reward, request.images.shape[1:], request.with_gradient][index] = prepared
            except ContractError as error:
                answers[index] = error
        for group in groups.values():
            outcomes = self._score_group(list(group.values()))
            answers |= {index: _answer(group[index], out) for index, out in zip(group, outcomes, strict=True)}
        return [answers[index] for index in range(len(jobs))]

    def _prepare(self, job: Job) -> _Prepared:
        served = self._rewards.get(job.request.reward)
        if served is None:
            raise ContractError(f"reward {job.request.reward!r} is not served here; served: {', '.join(self.versions)}")
        return _Prepared(
            job=job,
            served=served,
            positive_embeds=served.embed_texts([pair.positive_text for pair in job.request.pairs]),
            negative_embeds=served.embed_texts([pair.negative_text for pair in job.request.pairs]),
        )

    def _score_group(self, group: list[_Prepared]) -> list[PairReward]:
        """One PairReward per member; the model never sees more than max_batch_images at once."""
        request, model = group[0].job.request, group[0].served.model
        evaluate = value_and_image_gradient if request.with_gradient else value
        images = torch.from_numpy(np.concatenate([member.job.request.images for member in group]))
        positive_embeds = torch.cat([member.positive_embeds for member in group])
        negative_embeds = torch.cat([member.negative_embeds for member in group])
        scales = [k for member in group for k in member.job.request.preference_scales]
        preference_scale = torch.tensor(scales, device=positive_embeds.device)
        inputs = (images, positive_embeds, negative_embeds, preference_scale)
        chunks = zip(*(tensor.split(self._max_batch_images) for tensor in inputs), strict=True)
        outcomes = [evaluate(model.embed_image, *chunk) for chunk in chunks]
        return _split(outcomes, [member.job.num_images for member in group])


class _Served:
    """A model with the embeddings of the texts it saw last; training prompts come back every epoch."""

    def __init__(self, model: RewardModel, num_cached_texts: int) -> None:
        self.model = model
        self._num_cached_texts = num_cached_texts
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), embedding)."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if unseen:
            self._cache |= zip(unseen, self.model.embed_text(unseen), strict=True)
        for text in texts:
            self._cache.move_to_end(text)
        embeds = torch.stack([self._cache[text] for text in texts])
        while len(self._cache) > self._num_cached_texts:
            self._cache.popitem(last=False)
        return embeds


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    job: Job
    served: _Served
    positive_embeds: Tensor
    negative_embeds: Tensor


def _split(outcomes: list[PairReward], sizes: list[int]) -> list[PairReward]:
    """The chunks' outcomes, joined and cut again into one for each caller."""

    def cut(parts: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.cat(parts).cpu().split(sizes)

    gradients = [outcome.image_gradient for outcome in outcomes if outcome.image_gradient is not None]
    return [
        PairReward(*parts)
        for parts in zip(
            cut([outcome.rewards for outcome in outcomes]),
            cut([outcome.positive_similarities for outcome in outcomes]),
            cut([outcome.negative_similarities for outcome in outcomes]),
            cut(gradients) if gradients else [None] * len(sizes),
            strict=True,
        )
    ]


def _answer(prepared: _Prepared, outcome: PairReward) -> Answer:
    request = prepared.job.request
    for index, pair in enumerate(request.pairs):
        gradient = outcome.image_gradient
        if not (outcome.rewards[index].isfinite() and (gradient is None or gradient[index].isfinite().all())):
            return ContractError(f"images[{index}] has no finite {request.reward} reward or gradient under {pair}")
    return RewardResponse(
        rewards=_numpy(outcome.rewards),
        positive_similarities=_numpy(outcome.positive_similarities),
        negative_similarities=_numpy(outcome.negative_similarities),
        image_gradient=None if outcome.image_gradient is None else _numpy(outcome.image_gradient),
        scorer=f"{request.reward}@{prepared.served.model.checksum}",
        request_id=prepared.job.request_id,
    )


def _numpy(tensor: Tensor) -> Float32:
    return tensor.numpy()
