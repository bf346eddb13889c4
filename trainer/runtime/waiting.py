"""Say every half minute what a training is waiting for, as long as its workers find no room on the cluster.

with waiting_told(Asked.of(config.engine)):
    trainer.fit()
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayError
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from trainer.runtime.resources import Amounts, Asked, amount, node_totals, num_that_fit, number, shortage

_WORKER = "RayTrainWorker"  # the class of Ray Train's workers
_NUM_HOLDERS = 4


@contextmanager
def waiting_told(
    asked: Asked, tell: Callable[[str], object] = lambda line: print(line, flush=True), every_s: float = 30.0
) -> Iterator[None]:
    """Within the context, `tell` a line at once and every `every_s` while this program's workers lack room.

    That may be at the start, and again when workers have died and others took their place.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            try:
                line = None if _has_workers() else waiting_line(asked)
            except RayError:
                return  # the cluster has gone, as whoever trains on it will report
            if line is not None and not is_over.is_set():
                tell(line)
            is_over.wait(every_s)

    thread = threading.Thread(target=watch, name="waiting_told", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=every_s)  # a question to a cluster that hangs must not hold up the end


def waiting_line(asked: Asked) -> str | None:
    """Say what the workers of a run lack at this moment; None if there is room for them."""
    free, nodes = list(ray._private.state.available_resources_per_node().values()), node_totals()
    if num_that_fit(asked.each, free) >= asked.num_workers:
        return None
    has_nodes = shortage(asked, nodes) is None
    available, present = _sums(asked.each, free), _sums(asked.each, nodes)
    have = available if has_nodes else present
    short = [name for name in asked.each if asked.total(name) > have[name]] or list(asked.each)
    if not has_nodes:
        parts = [
            f"the run asks for {amount(name, asked.total(name))}, {number(name, present[name])} are there"
            for name in short
        ]
        return f"waiting for nodes: {'; '.join(parts)}"
    parts = [
        f"{amount(name, asked.total(name))}: {number(name, available[name])} of {number(name, present[name])} free"
        for name in short
    ]
    return f"waiting for {'; '.join(parts)}{_holders(short)}"


def _sums(each: Amounts, nodes: Sequence[Amounts]) -> dict[str, float]:
    return {name: sum(node.get(name, 0) for node in nodes) for name in each}


def _has_workers() -> bool:
    """Return whether this program has workers that live or start; Ray Train makes them once it has their room."""
    ours = ray.get_runtime_context().get_job_id()
    living = (each for each in ray._private.state.actors().values() if each["State"] != "DEAD")
    return any(each["ActorClassName"] == _WORKER and each["JobID"] == ours for each in living)


def _holders(names: Sequence[str]) -> str:
    """Name the actors that hold most of these resources, as far as the cluster's dashboard tells."""
    address = ray.get_runtime_context().gcs_address
    try:
        actors = list_actors(address, filters=[("state", "=", "ALIVE")], detail=True, limit=1000, timeout=5)
    except (RayStateApiException, ConnectionError):  # there is no dashboard, or it is busy
        return ""
    held: dict[tuple[str, str], float] = defaultdict(float)
    for actor in actors:
        for name in names:
            holder = actor.name or f"{actor.class_name} of job {actor.job_id}"
            held[name, holder] += _held(actor.required_resources or {}, name)
    largest = sorted(held.items(), key=lambda each: -each[1])[:_NUM_HOLDERS]
    parts = [f"{holder} holds {amount(name, each)}" for (name, holder), each in largest if each]
    return f"; {', '.join(parts)}" if parts else ""


def _held(required: Amounts, name: str) -> float:
    """
    >>> _held({"CPU_group_3cf9": 2.0, "CPU_group_0_3cf9": 2.0}, "CPU")  # of an actor in a placement group
    2.0
    """
    return max((each for key, each in required.items() if key.partition("_group_")[0] == name), default=0.0)
