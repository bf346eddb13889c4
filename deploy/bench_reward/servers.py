"""Start and stop the servers to compare: the service as `make up` runs it, and the baseline."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
import yaml

from deploy.local import LocalServices
from deploy.process import OwnedProcess
from deploy.settings import HOST, ROOT, Settings, free_port

NUM_PROCESSES = 2  # of each server, one torch thread in each
STORED_ANSWER_BYTES = 16 << 20  # of each replica of the service
_START_TIMEOUT_S = 180.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process, in bytes: resident (partly shared with others), and private."""

    resident: int
    private: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its URL, and its processes, whose time and memory count as its own."""

    url: str
    process: OwnedProcess

    def cpu_seconds(self) -> float:
        """Return the CPU-seconds of all its processes so far."""
        return sum(_cpu_seconds(member) for member in self.process.members())

    def memory(self) -> dict[str, Memory]:
        """Return the memory of each process, by "name pid"."""
        return {f"{_name(each)} {each.pid}": _memory(each) for each in self.process.members()}


def _memory(process: psutil.Process) -> Memory:
    memory = process.memory_full_info()
    return Memory(int(memory.rss), int(memory.uss))


def _name(process: psutil.Process) -> str:
    """ray::ServeReplica:…, a program, or the module or script that a Python runs."""
    words = [word for word in process.cmdline() if not word.startswith("-")]
    is_python = len(words) > 1 and Path(words[0]).name.startswith("python")
    return Path(words[is_python].split()[0]).name


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@contextmanager
def service(folder: Path, models: Mapping[str, Path]) -> Iterator[Server]:
    """Run deploy/serve.yaml with these models, as many replicas as the baseline has workers, and no rate limit."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    application["args"] |= {
        "rewards": {name: {"kind": "clip", "path": str(path)} for name, path in models.items()},
        # The stores of answers and texts are soon full, so that memory can be compared before and after.
        "limits": {"requests_per_s": 1e6, "request_burst": 10**6, "max_stored_answer_bytes": STORED_ANSWER_BYTES},
        "num_cached_texts": 256,
    }
    application["deployments"][0]["num_replicas"] = NUM_PROCESSES
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    services = LocalServices(Settings(free_port(), free_port(), free_port(), folder / "run", path))
    services.up(["ray"])
    try:
        yield Server(services.settings.serve_url, services.ray)
    finally:
        services.down()


@contextmanager
def baseline(folder: Path, models: Mapping[str, Path]) -> Iterator[Server]:
    """Run baseline.py under gunicorn, with sync workers."""
    process, port = OwnedProcess("baseline", folder / "run"), free_port()
    argument = ",".join(f"{name}={path}" for name, path in models.items())
    command = [
        *(sys.executable, "-m", "gunicorn", "--workers", str(NUM_PROCESSES), "--worker-class", "sync"),
        *("--timeout", "300", "--no-control-socket", "--bind", f"{HOST}:{port}"),
        f"deploy.bench_reward.baseline:make_app({argument!r})",
    ]
    process.start(command, ROOT, {"OMP_NUM_THREADS": "1"})
    try:
        _wait_for(f"http://{HOST}:{port}/healthz", process)
        yield Server(f"http://{HOST}:{port}", process)
    finally:
        process.stop()


def _wait_for(url: str, process: OwnedProcess) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.is_running() and time.monotonic() < deadline:
        try:
            if requests.get(url, timeout=10).ok:
                return
        except requests.RequestException:
            time.sleep(_POLL_S)
    raise TimeoutError(f"{process.name} did not start; its last words:\n{process.last_lines()}")
