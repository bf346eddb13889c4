"""A job that names the variables with the caller's secret, and needs longer to end than Ray allows by default.

python -m tests.integration.slow_to_end RUN.yaml SHA256
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import ray

from services.config.run import load_run_config
from trainer.runtime.cluster import worker_environment

_NEEDS_S = 7.0  # Ray's default is 3


def holders(digest: str) -> list[str]:
    """Return the variables whose value has this digest."""
    return sorted(name for name, value in os.environ.items() if hashlib.sha256(value.encode()).hexdigest() == digest)


def end(*_: object) -> NoReturn:
    time.sleep(_NEEDS_S)
    print("checkpoint written", flush=True)
    os._exit(0)


if __name__ == "__main__":
    run_file, digest = sys.argv[1:]
    ray.init(log_to_driver=False)
    environment = {"env_vars": worker_environment(load_run_config(Path(run_file)))}
    in_worker = ray.remote(holders).options(runtime_env=environment, num_cpus=0).remote(digest)
    print("driver:", *holders(digest))
    print("worker:", *ray.get(in_worker))
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    signal.pause()
