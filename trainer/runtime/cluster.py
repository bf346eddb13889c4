"""Join a Ray cluster, and say what a process that computes for a run needs in its environment."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import ray

from services.clients.environment import carried
from services.config.run import RunConfig
from trainer.runtime.resources import Asked, ClusterError, require_room

__all__ = ["ClusterError", "check_cluster", "connect", "worker_environment"]

_ROOT = Path(__file__).resolve().parents[2]
_CONNECT_TIMEOUT_S = 5


def check_cluster(address: str) -> None:
    """Raise ClusterError if nothing listens at `address` (host:port, also ray://…): ray.init would wait for ever."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.port is None:
        return  # "", "auto" or "local"
    try:
        socket.create_connection((place.hostname, place.port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS"
        ) from error


def connect(config: RunConfig, num_workers: int | None = None) -> None:
    """Join the cluster at RAY_ADDRESS or on this machine; if there is none, start one that ends with this process.

    Raise ClusterError if it can never hold `num_workers` workers of the run, by default the fewest.
    """
    asked = Asked.of(config.engine, num_workers)
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), logging_level="WARNING")
    except ConnectionError:
        if "RAY_ADDRESS" in os.environ:
            raise
        cores = max(math.ceil(asked.total("CPU")), os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, logging_level="WARNING")
    require_room(asked)


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment variables of a worker of the run."""
    python_path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = carried(os.environ) | {
        "PYTHONPATH": os.pathsep.join(python_path),  # a checkout that is not installed
        "OMP_NUM_THREADS": str(config.engine.threads_per_worker),  # read on import, before torch.set_num_threads
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars of loaders, which a log cannot show
    }
    return environment if config.engine.use_gpu else environment | {"DS_ACCELERATOR": "cpu"}
