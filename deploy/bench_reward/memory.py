"""Memory after warm-up and after so many requests more, of every process of the service.

Asked as our clients ask, each request with an Idempotency-Key of its own, so that the service keeps its answer.
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
    """By process ("name pid"), in bytes; a process that began or ended in between is left out."""

    num_requests: int
    before: Mapping[str, Memory]
    after: Mapping[str, Memory]

    def share(self, part: str = "") -> float:
        """By how much the private memory of the processes with `part` in their name has grown, together."""
        chosen = [name for name in self.before.keys() & self.after.keys() if part in name]
        before, after = (sum(memory[name].private for name in chosen) for memory in (self.before, self.after))
        return after / before - 1

    def lines(self) -> list[str]:
        """A row of Markdown for each process, the one that grew most first."""
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
    """Of `mixed_requests` at 8 callers; the warm-up fills the text cache and the store of answers."""
    requests = mixed_requests(model)
    _send(service, requests, num_warm_up)
    before = service.memory()
    _send(service, requests, num_requests)
    return Growth(num_requests, before, service.memory())


def _send(service: Server, requests: Iterator[HttpRequest], num: int) -> None:
    for done in range(0, num, _CHUNK):
        drive(service.url, list(itertools.islice(requests, min(_CHUNK, num - done))), _CALLERS)


def mixed_requests(model: Served) -> Iterator[HttpRequest]:
    """Without end: of four, three for people, one of them with texts that are new, and one for its gradient."""
    pictures, lines = itertools.cycle(jpegs()), model.num_prompt_lines
    known, unseen = itertools.cycle(pairs(lines)), unseen_pairs(lines)
    for number in itertools.count():
        pair = next(known if number % 4 else unseen)
        if number % 4 == 1:
            request = binary(model.name, [pair], model.size_px, with_gradient=True)
        else:
            request = to_service(model.name, next(pictures), pair)
        yield replace(request, idempotency_key=uuid.uuid4().hex)
