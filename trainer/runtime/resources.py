"""Compare what a run asks of a cluster with what the cluster has.

asked = Asked.of(config.engine)
require_room(asked)  # ClusterError if the cluster can never hold the workers
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from services.config.engine import EngineConfig

_GIB = 2**30
_UNITS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}
_CURES = {
    "CPU": "lower engine.cpus_per_worker",
    "GPU": "set engine.use_gpu to false",
    "memory": "lower engine.memory_gib_per_worker",
}
_REPORT = "__autoscaling_status"  # where the autoscaler writes its report
_REPORTS_WITHIN_S = 10.0  # of the start of a cluster
_POLL_S = 0.5
_GROUP_LABEL = "ray.io/node-group"  # of a node that belongs to a group of an autoscaler or of KubeRay
_NO_GROUP = "node_"  # begins the name of the type of a node that no autoscaler has made

Amounts = Mapping[str, float]  # by Ray's names; memory in bytes


class ClusterError(RuntimeError):
    """No cluster answers, or it cannot hold the run; the text has the numbers and the cure."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The workers that a run needs at least, and what Ray reserves for each.

    >>> Asked(num_workers=4, each={"CPU": 1.0, "GPU": 1.0}).total("GPU")
    4.0
    """

    num_workers: int
    each: Amounts

    @classmethod
    def of(cls, engine: EngineConfig, num_workers: int | None = None) -> Asked:
        """Return what `num_workers` of the run's workers ask for, by default the fewest that it can have."""
        return cls(engine.min_workers if num_workers is None else num_workers, worker_resources(engine))

    def total(self, resource: str) -> float:
        return self.num_workers * self.each[resource]


def worker_resources(engine: EngineConfig) -> dict[str, float]:
    """Return what Ray reserves for a worker, by Ray's names; memory in bytes."""
    gpus = {"GPU": 1.0} if engine.use_gpu else {}
    memory = {} if engine.memory_gib_per_worker is None else {"memory": engine.memory_gib_per_worker * _GIB}
    return {"CPU": engine.cpus_per_worker, **gpus, **memory}


def require_room(asked: Asked) -> None:
    """Raise ClusterError if the workers can never fit on the cluster of this process. An autoscaler may add nodes."""
    if (problem := shortage(asked, node_totals())) is not None and not _may_grow():
        raise ClusterError(problem)


def node_totals() -> list[Amounts]:
    """Return what each living node of the cluster has, whether free or taken."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_that_fit(each: Amounts, nodes: Sequence[Amounts]) -> int:
    """Return how many workers nodes with these amounts hold; a worker is on one node.

    >>> num_that_fit({"CPU": 3.0}, [{"CPU": 4.0}, {"CPU": 8.0}, {"GPU": 1.0}])
    3
    """
    # Ray counts in ten-thousandths: 0.3 / 0.1 must be 3
    return sum(min(math.floor(node.get(name, 0) / amount + 1e-4) for name, amount in each.items()) for node in nodes)


def shortage(asked: Asked, nodes: Sequence[Amounts]) -> str | None:
    """Say why nodes with these amounts cannot hold the workers; None if they can."""
    possible = num_that_fit(asked.each, nodes)
    if possible >= asked.num_workers:
        return None
    if possible == 0:
        return _no_node_is_large_enough(asked.each, nodes)
    lower = f"lower engine.num_workers to {possible} or add nodes"
    for name, each in asked.each.items():
        owned = [node[name] for node in nodes if node.get(name)]
        if asked.total(name) > sum(owned):
            return (
                f"the run asks for {amount(name, asked.total(name))} (engine.num_workers {asked.num_workers} × "
                f"{number(name, each)}), the cluster has {number(name, sum(owned))} on {_count(owned)}: {lower}"
            )
    wanted = ", ".join(amount(*each) for each in asked.each.items())
    return (
        f"the run asks for engine.num_workers {asked.num_workers}, each with {wanted} on one node, and the cluster's "
        f"{_count(nodes)} have room for {possible}: {lower}"
    )


def number(name: str, value: float) -> str:
    """
    >>> number("memory", 3 * 2**30)
    '3'
    """
    return f"{value / _GIB if name == 'memory' else value:.4g}"


def amount(name: str, value: float) -> str:
    """
    >>> amount("CPU", 4.0), amount("GPU", 1.0)
    ('4 CPUs', '1 GPU')
    """
    unit = _UNITS[name].removesuffix("s") if value == 1 else _UNITS[name]
    return f"{number(name, value)} {unit}"


def _no_node_is_large_enough(each: Amounts, nodes: Sequence[Amounts]) -> str:
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in each}
    short = [name for name in each if most[name] < each[name]] or list(each)  # or no node has all of them at once
    wanted, had = (", ".join(amount(name, values[name]) for name in short) for values in (each, most))
    cures = " or ".join(_CURES[name] for name in short)
    return (
        f"a worker asks for {wanted} on one node, and the cluster's nodes have at most {had}: {cures}, "
        "or add a larger node"
    )


def _count(nodes: Sequence[object]) -> str:
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)}"


def _may_grow() -> bool:
    """Return whether an autoscaler adds nodes to the cluster of this process: Ray's own or KubeRay's, of both versions.

    Ray's first version also runs where it has nothing to scale; it then names each node's type for the node.
    """
    if is_autoscaler_v2(fetch_from_server=True):
        return any(_GROUP_LABEL in node["Labels"] for node in ray.nodes())
    deadline = time.monotonic() + _REPORTS_WITHIN_S
    while not (types := node_types(_internal_kv_get(_REPORT))) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return any(not each.startswith(_NO_GROUP) for each in types)


def node_types(report: bytes | None) -> list[str]:
    """Return the types of the nodes in an autoscaler's report.

    >>> node_types(b'{"autoscaler_report": {"node_type_mapping": {"5c16": "ray.head.default", "27f7": "node_27f7"}}}')
    ['ray.head.default', 'node_27f7']
    """
    found = json.loads(report or b"{}").get("autoscaler_report") or {}
    return list(found.get("node_type_mapping", {}).values())
