"""What the matrix runs on: a Ray cluster of one or two nodes, the reward service behind a proxy, and MLflow.

All belong to this program, on free ports, in a folder of its own, and end with it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from deploy.faults.proxy import Proxy
from deploy.local import LocalServices
from deploy.process import OwnedProcess
from deploy.settings import ROOT, Settings, free_port

NODE_IP = "127.0.0.3"  # of the second node: loopback as well


class Stage:
    """The services, and where they are."""

    def __init__(self, services: LocalServices, proxy: Proxy, folder: Path) -> None:
        self.services, self.proxy, self.folder = services, proxy, folder
        self.node = OwnedProcess("node", services.settings.run_dir)

    @property
    def mlflow(self) -> OwnedProcess:
        return self.services.mlflow

    def addresses(self) -> dict[str, Any]:
        """Return the sections of a run file that name the services."""
        settings = self.services.settings
        return {"reward_service": {"url": self.proxy.url}, "tracking": {"uri": settings.mlflow_url}}

    def environment(self) -> dict[str, str]:
        """Return what a launcher needs to join the cluster."""
        return {"RAY_ADDRESS": self.ray_address, "RAY_AUTH_MODE": "token"}

    @property
    def ray_address(self) -> str:
        current = Path(self.services.ray.notes()["temp_dir"]) / "ray_current_cluster"
        return current.read_text(encoding="utf-8").strip()

    def start_node(self, num_cpus: float) -> None:
        """Start a second raylet on this machine."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            f"--address={self.ray_address}",
            f"--num-cpus={num_cpus:g}",
            f"--object-store-memory={128 * 2**20}",
            f"--node-ip-address={NODE_IP}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        self.node.start(command, ROOT, {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": None})

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the cluster's nodes."""
        return [*self.services.ray.members(), *self.node.members()]

    def restart_ray(self) -> None:
        """Start the cluster again after its head is gone."""
        self.node.stop()
        self.services.down([self.services.ray])
        self.services.up(("ray",))
        self.proxy.target = self.services.settings.serve_url

    def restart_mlflow(self) -> None:
        self.services.up(("mlflow",))


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Start the services, and stop all of them at the end."""
    with tempfile.TemporaryDirectory(prefix="srpo-faults-") as temp:
        folder = Path(temp)
        (folder / "logs").mkdir()
        settings = Settings(
            dashboard_port=free_port(), serve_port=free_port(), mlflow_port=free_port(), run_dir=folder / "run"
        )
        services = LocalServices(settings)
        services.up()
        try:
            with Proxy(settings.serve_url) as proxy:
                stage = Stage(services, proxy, folder)
                try:
                    yield stage
                finally:
                    stage.node.stop()
        finally:
            services.down()
