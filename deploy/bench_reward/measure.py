"""Make one round of each measurement after the other, so that other work on the machine slows all sides alike."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from deploy.bench_reward.bare import BareModel
from deploy.bench_reward.load import BenchError, Seen, drive, send
from deploy.bench_reward.models import Served
from deploy.bench_reward.requests import (
    PREFERENCE_SCALE,
    HttpRequest,
    binary,
    jpegs,
    pairs,
    to_baseline,
    to_service,
    unseen_pairs,
)
from deploy.bench_reward.servers import Server
from services.contract import PromptPair

BATCH, BATCH_CALLERS = 8, 4
_CALLERS = 8  # where it is not said otherwise
_CACHE_PASSES = 4  # of two replicas, each misses one text in sixteen after that
_TOLERANCE = 0.02  # of a reward: the two resize a picture a little differently


@dataclass(slots=True)
class Side:
    """One side of a comparison, over all rounds."""

    per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # for each request
    seconds: list[float] = field(default_factory=list)  # of every request

    def add(self, seen: Seen, cpu_s: float) -> None:
        self.per_s.append(seen.answers_per_s)
        self.cpu_s.append(cpu_s / len(seen.seconds))
        self.seconds += seen.seconds


@dataclass(slots=True)
class Comparison:
    """`ours` against `theirs`, `what` in words."""

    what: str
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)


@dataclass(slots=True)
class Bench:
    """One model on both servers, and bare."""

    model: Served
    service: Server
    baseline: Server
    bare: BareModel
    pictures: list[bytes] = field(default_factory=jpegs)
    pairs: list[PromptPair] = field(init=False)
    unseen: Iterator[PromptPair] = field(init=False)

    def __post_init__(self) -> None:
        self.pairs, self.unseen = pairs(self.model.num_prompt_lines), unseen_pairs(self.model.num_prompt_lines)

    def check_same_answers(self) -> None:
        """Check that both servers give the same rewards. Raise BenchError."""
        for picture, pair in zip(self.pictures, self.pairs, strict=False):
            ours = json.loads(send(self.service.url, to_service(self.model.name, picture, pair)))["results"][0][
                "reward"
            ]
            ((positive, negative),) = pickle.loads(send(self.baseline.url, self._pair_to_baseline(picture, pair)))
            theirs = (1 + PREFERENCE_SCALE) * positive - negative
            if abs(ours - theirs) > _TOLERANCE:
                raise BenchError(f"{self.model.name}: the service answers {ours}, the baseline {theirs}")

    def fill_text_caches(self) -> None:
        """Send all texts several times: every replica has a cache of its own and sees only its share of requests."""
        inputs = zip(itertools.cycle(self.pictures), self.pairs * _CACHE_PASSES, strict=False)
        drive(self.service.url, [to_service(self.model.name, *each) for each in inputs], _CALLERS)

    def single(self, num_callers: int, into: Comparison) -> str:
        """Compare one picture under one pair: one forward."""
        num = self.model.num_single[num_callers]
        inputs = list(itertools.islice(zip(itertools.cycle(self.pictures), itertools.cycle(self.pairs)), num))
        ours = [to_service(self.model.name, *each) for each in inputs]
        theirs = [self._pair_to_baseline(*each) for each in inputs]
        return self._both(into, ours, theirs, num_callers)

    def unseen_texts(self, into: Comparison) -> str:
        """Compare as `single` does, but with no text twice."""
        inputs = list(zip(itertools.cycle(self.pictures), itertools.islice(self.unseen, self.model.num_unseen)))
        ours = [to_service(self.model.name, *each) for each in inputs]
        theirs = [self._pair_to_baseline(*each) for each in inputs]
        return self._both(into, ours, theirs, _CALLERS)

    def pair_cost(self, num_callers: int, into: Comparison) -> str:
        """Compare an SRPO pair: one request here; there the picture is sent and encoded for each of the two texts."""
        num = self.model.num_single[num_callers]
        inputs = list(itertools.islice(zip(itertools.cycle(self.pictures), itertools.cycle(self.pairs)), num))
        ours = [to_service(self.model.name, *each) for each in inputs]
        theirs = [
            to_baseline(self.model.name, picture, [text])
            for picture, pair in inputs
            for text in (pair.positive_text, pair.negative_text)
        ]
        text = self._both(into, ours, theirs, num_callers)
        into.theirs.cpu_s[-1] *= 2  # two requests make a pair
        into.theirs.per_s[-1] /= 2
        return text

    def batches(self, with_gradient: bool, into: Comparison) -> str:
        """Compare the binary route with the bare model, in images per second."""
        num = self.model.num_binary[with_gradient]
        request = binary(self.model.name, self.pairs[:BATCH], self.model.size_px, with_gradient)
        cpu_s = self.service.cpu_seconds()
        seen = drive(self.service.url, [request] * num, BATCH_CALLERS)
        into.ours.add(seen, self.service.cpu_seconds() - cpu_s)
        into.ours.per_s[-1] *= BATCH
        into.theirs.per_s.append(self.bare.images_per_s(BATCH, max(num // 2, 1), with_gradient))
        return _line(into)

    def _both(
        self, into: Comparison, ours: Sequence[HttpRequest], theirs: Sequence[HttpRequest], num_callers: int
    ) -> str:
        for side, server, requests in (
            (into.theirs, self.baseline, theirs),
            (into.ours, self.service, ours),
        ):
            cpu_s = server.cpu_seconds()
            seen = drive(server.url, requests, num_callers)
            side.add(seen, server.cpu_seconds() - cpu_s)
        return _line(into)

    def _pair_to_baseline(self, picture: bytes, pair: PromptPair) -> HttpRequest:
        return to_baseline(self.model.name, picture, [pair.positive_text, pair.negative_text])


def _line(comparison: Comparison) -> str:
    ours, theirs = comparison.ours.per_s[-1], comparison.theirs.per_s[-1]
    return f"{comparison.what}: {ours:.1f}/s against {theirs:.1f}/s ({ours / theirs:.2f} x)"
