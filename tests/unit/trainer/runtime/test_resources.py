"""A run that a cluster can never hold is refused with the numbers and what to lower."""

from __future__ import annotations

import re

import pytest

from services.config.engine import EngineConfig
from trainer.runtime.resources import Amounts, Asked, node_types, num_that_fit, shortage, worker_resources

GIB = 2**30
EIGHT_GPUS: Amounts = {"CPU": 64.0, "GPU": 8.0, "memory": 512.0 * GIB}
HEAD: Amounts = {"CPU": 0.0, "memory": 4.0 * GIB}


def asked(num_workers: int, **each: float) -> Asked:
    return Asked(num_workers, each)


@pytest.mark.parametrize(
    ("run", "nodes", "text"),
    [
        (asked(8, CPU=1, GPU=1), [HEAD, EIGHT_GPUS], None),
        (asked(6, CPU=0.1), [{"CPU": 0.3}, {"CPU": 0.3}], None),  # in floats 0.3 / 0.1 is less than 3
        (
            asked(32, CPU=1, GPU=1),
            [HEAD, EIGHT_GPUS],
            "the run asks for 32 GPUs (engine.num_workers 32 × 1), the cluster has 8 on 1 node: "
            "lower engine.num_workers to 8 or add nodes",
        ),
        (
            asked(8, CPU=10, GPU=1),
            [EIGHT_GPUS],
            "the run asks for 80 CPUs (engine.num_workers 8 × 10), the cluster has 64 on 1 node: "
            "lower engine.num_workers to 6 or add nodes",
        ),
        (
            asked(8, CPU=1, memory=96 * GIB),
            [EIGHT_GPUS],
            "the run asks for 768 GiB of memory (engine.num_workers 8 × 96), the cluster has 512 on 1 node: "
            "lower engine.num_workers to 5 or add nodes",
        ),
        (
            asked(4, CPU=3),
            [{"CPU": 5.0}, {"CPU": 5.0}, {"CPU": 5.0}],
            "the run asks for engine.num_workers 4, each with 3 CPUs on one node, and the cluster's 3 nodes have room "
            "for 3: lower engine.num_workers to 3 or add nodes",
        ),
        (
            asked(1, CPU=3, memory=16 * GIB),
            [{"CPU": 2.0, "memory": 64.0 * GIB}, {"CPU": 2.0, "memory": 64.0 * GIB}],
            "a worker asks for 3 CPUs on one node, and the cluster's nodes have at most 2 CPUs: "
            "lower engine.cpus_per_worker, or add a larger node",
        ),
        (
            asked(1, CPU=1, GPU=1),
            [{"CPU": 2.0}],
            "a worker asks for 1 GPU on one node, and the cluster's nodes have at most 0 GPUs: "
            "set engine.use_gpu to false, or add a larger node",
        ),
        (
            asked(1, CPU=8, memory=16 * GIB),
            [{"CPU": 8.0, "memory": 8.0 * GIB}, {"CPU": 2.0, "memory": 64.0 * GIB}],
            "a worker asks for 8 CPUs, 16 GiB of memory on one node, and the cluster's nodes have at most 8 CPUs, "
            "64 GiB of memory: lower engine.cpus_per_worker or lower engine.memory_gib_per_worker, "
            "or add a larger node",
        ),
    ],
)
def test_what_never_fits_is_said_with_numbers_and_cure(run: Asked, nodes: list[Amounts], text: str | None) -> None:
    assert shortage(run, nodes) == text


@pytest.mark.parametrize(("run", "nodes"), [(asked(32, CPU=1, GPU=1), [EIGHT_GPUS]), (asked(9, CPU=2), [{"CPU": 9.0}])])
def test_the_number_that_is_advised_fits(run: Asked, nodes: list[Amounts]) -> None:
    advised = re.search(r"lower engine.num_workers to (\d+)", shortage(run, nodes) or "")
    assert advised
    possible = int(advised[1])
    assert possible == num_that_fit(run.each, nodes)
    assert shortage(Asked(possible, run.each), nodes) is None
    assert shortage(Asked(possible + 1, run.each), nodes) is not None


def test_a_worker_asks_for_what_the_keys_say() -> None:
    assert worker_resources(EngineConfig(cpus_per_worker=0.5)) == {"CPU": 0.5}
    engine = EngineConfig(use_gpu=True, memory_gib_per_worker=96, num_workers=4, global_batch=4)
    assert Asked.of(engine) == Asked(4, {"CPU": 1.0, "GPU": 1.0, "memory": 96 * GIB})
    assert Asked.of(engine, num_workers=1).num_workers == 1


def test_an_autoscaler_that_has_not_reported_yet_names_no_type() -> None:
    for report in (None, b"{}", b'{"autoscaler_report": null}', b'{"autoscaler_report": {}}'):
        assert node_types(report) == []
