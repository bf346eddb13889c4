"""Measure the memory of every process of the service, after a warm-up and again after many requests.

As from our clients, each request has an Idempotency-Key of its own, so that the service stores its answer.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from deploy.bench_reward.load import drive
from deploy.bench_reward.models import Served
from deploy.bench_reward.requests import HttpRequest, binary, jpegs, pairs, to_service, unseen_pairs
from deploy.bench_reward.servers import Memory, Server

_CALLERS = 8
_CHUNK = 500  # bodies made ahead, in our memory


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory by process ("name pid"), in bytes; a process that began or ended in between is left out."""

    num_requests: int
    before: Mapping[str, Memory]
    after: Mapping[str, Memory]

    def share(self, part: str = "") -> float:
        """Return the relative growth of the private memory of all processes with `part` in their name."""
        chosen = [name for name in self.before.keys() & self.after.keys() if part in name]
        before, after = (sum(memory[name].private for name in chosen) for memory in (self.before, self.after))
        return after / before - 1

    def lines(self) -> list[str]:
        """Return a row of Markdown for each process, the one that grew most first."""
        both = sorted(
            self.before.keys() & self.after.keys(),
            key=lambda name: self.before[name].private - self.after[name].private,
        )
        mib = 1 / 2**20
        return [
            f"| {name} | {before.resident * mib:.1f} | {after.resident * mib:.1f} | "
            f"{before.private * mib:.1f} | {after.private * mib:.1f} | {after.private / before.private - 1:+.1%} |"
            for name in both
            for before, after in [(self.before[name], self.after[name])]
        ]

    def table(self) -> str:
        head = "| process | resident before, MiB | after | private before, MiB | after | growth |"
        return "\n".join([head, "|---" * 6 + "|", *self.lines()])


def memory_growth(service: Server, model: Served, num_warm_up: int, num_requests: int) -> Growth:
    """Measure the growth under `mixed_requests` from 8 callers; the warm-up fills text cache and stored answers."""
    requests = mixed_requests(model)
    _send(service, requests, num_warm_up)
    before = service.memory()
    _send(service, requests, num_requests)
    return Growth(num_requests, before, service.memory())


def _send(service: Server, requests: Iterator[HttpRequest], num: int) -> None:
    for done in range(0, num, _CHUNK):
        drive(service.url, list(itertools.islice(requests, min(_CHUNK, num - done))), _CALLERS)


def mixed_requests(model: Served) -> Iterator[HttpRequest]:
    """Yield requests without end: of four, three to /v1/score, one of these with new texts, and one for a gradient."""
    pictures, lines = itertools.cycle(jpegs()), model.num_prompt_lines
    known, unseen = itertools.cycle(pairs(lines)), unseen_pairs(lines)
    for number in itertools.count():
        pair = next(known if number % 4 else unseen)
        if number % 4 == 1:
            request = binary(model.name, [pair], model.size_px, with_gradient=True)
        else:
            request = to_service(model.name, next(pictures), pair)
        yield replace(request, idempotency_key=uuid.uuid4().hex)
