"""Start workers as Ray Train does, but without Ray: processes with the environment that a process group needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from deploy.settings import free_port


def in_workers(num_workers: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call function(rank, *arguments) in each worker, which joins the process group itself. Raise what one raises."""
    spawn(_worker, (num_workers, free_port(), function, arguments), nprocs=num_workers)


def _worker(rank: int, num_workers: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    shard_small_parameters()
    function(rank, *arguments)
    dist.barrier()  # a worker that exits early breaks the others' connection
    dist.destroy_process_group()


def shard_small_parameters() -> None:
    """Make stage 3 shard tensors of more than 16 numbers in this worker, and update them in groups of some 100.

    DeepSpeed keeps tensors up to 1e5 numbers whole on each worker and updates 1e9 at a time. Our tests' policies are
    smaller than that; so they have tensors of both kinds and several groups, as a large one has.
    """
    import deepspeed  # in the worker: it reads the environment on import

    initialize = deepspeed.initialize

    def initialize_sharded(*, config: dict[str, Any], **arguments: Any) -> Any:
        zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 16, "sub_group_size": 100}
        return initialize(config=config | {"zero_optimization": zero}, **arguments)

    deepspeed.initialize = initialize_sharded
