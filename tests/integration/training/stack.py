"""Run trainings on one stack of real services, observe their reward requests, and read what a run left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil
import torch
import yaml
from safetensors.torch import load_file
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.clients.checkpoint_store import CheckpointStore
from services.clients.run_folder import RunFolder
from services.clients.tracking import Tracker
from services.contract import REWARDS_PATH, RewardRequest
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.model.fragments import checkpoint_weights

ROOT = Path(__file__).resolve().parents[3]
NUM_STEPS = 6
HELD_OUT = PROMPTS[:5]
NUM_TOGETHER = 2  # images of an evaluation or of a check in one request
REQUESTS_BASE = 1 + 3 + 2  # the launcher's preflight, evaluation and check
REQUESTS_TWO_STEPS = 2 * 8 + 2  # 4 prompts × 2 branches for each step, and the check after them
TIMEOUT_S = 180


@dataclass
class RequestObserver:
    """The reward app, which records its requests and calls on_request for each: (requests so far, the caller's pid).

    A caller is identified by the port that it calls from. `requests`: the caller's pid and all words of each request.
    """

    app: ASGIApp
    on_request: Callable[[int, int], None] = lambda count, pid: None
    count: int = 0
    requests: list[tuple[int, set[str | None]]] = field(default_factory=list)

    def observe(self, on_request: Callable[[int, int], None]) -> None:
        """Call `on_request` from now on, and count from zero."""
        self.count, self.requests, self.on_request = 0, [], on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == REWARDS_PATH:
            pid = pid_at_port(scope["client"][1])
            self.count += 1
            self.on_request(self.count, pid)
            receive = self._recording(receive, pid)
        await self.app(scope, receive, send)

    def _recording(self, receive: Receive, pid: int) -> Receive:
        """Return a `receive` that records the request when its body is complete."""
        body = bytearray()

        async def pass_on() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body"):
                pairs = RewardRequest.from_bytes(bytes(body)).pairs
                self.requests.append((pid, {word for pair in pairs for word in (pair.positive, pair.negative)}))
            return message

        return pass_on


def pid_at_port(port: int) -> int:
    """Return the process that has a TCP connection at this local port."""
    (pid,) = {each.pid for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == port and each.pid}
    return pid


@dataclass
class TrainingStack:
    """What all runs share: a Ray cluster, a reward service, an MLflow store, and a tiny model in `folder`."""

    folder: Path
    ray_address: str
    reward_url: str
    observer: RequestObserver

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def write_run(
        self,
        name: str,
        stop_when: Sequence[dict[str, Any]] = (),
        sections: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> Path:
        """Write a run file and return its path. Its own paths are relative to `folder`, where runs start."""
        chosen = {
            **self._defaults(),
            "name": name,
            "engine": {"num_workers": 2, "global_batch": 4, "cpus_per_worker": 0.5} | engine,
            "guard": {"every_num_steps": 2, "num_prompts": 4, "stop_when": list(stop_when)},
            **(sections or {}),
        }
        path = self.folder / f"{name}.yaml"
        run = {key: value for key, value in chosen.items() if value is not None}
        path.write_text(yaml.safe_dump(run), encoding="utf-8")
        return path

    def _defaults(self) -> dict[str, Any]:
        size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
        return {
            "num_steps": NUM_STEPS,
            "model": {"path": "flux", **size},
            "prompts": {"path": "train.txt"},
            "control_words": {"positive": "3D", "negative": "Flat"},
            "rollout": {"num_steps": 3},
            "rewards": [{"name": "tiny"}],
            "reward_service": {"url": self.reward_url},
            "optimizer": {"learning_rate": 1e-3},
            "checkpoint": {"every_num_steps": 2, "num_kept": 4},
            "evaluation": {
                "prompts_path": "heldout.txt",
                "num_steps": 3,
                "every_num_steps": 4,
                "batch": NUM_TOGETHER,
                "judge_path": "judge",
            },
            "tracking": {"uri": self.tracking_uri, "log_model": "always"},
        }

    def start(self, run_file: Path, program: str = "trainer.launch", *arguments: str) -> subprocess.Popen[str]:
        """Start a program on a run file, in `folder`."""
        environment = os.environ | {
            "RAY_ADDRESS": self.ray_address,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-m", program, run_file.name, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **pipes)  # type: ignore[call-overload]

    def train(self, run_file: Path, *arguments: str) -> Run:
        """Train to the end. Return what the run left."""
        return self.find(run_file.stem, self.finish(run_file, "trainer.launch", *arguments))

    def finish(self, run_file: Path, program: str = "trainer.launch", *arguments: str) -> str:
        """Wait for a program that must succeed. Return what it printed."""
        with self.start(run_file, program, *arguments) as process:
            try:
                output, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def set_tag(self, name: str, key: str, value: str) -> None:
        """Set a tag on the latest run of this name, as a person may do in MLflow's pages."""
        Tracker.latest(self.tracking_uri, "srpo", name).set_tag(key, value)

    def find(self, name: str, output: str) -> Run:
        """Return what the run of this name left."""
        client = mlflow.MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name("srpo")
        (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return Run(RunFolder.find(self.folder / "outputs", name).path, client, run, output)


@dataclass
class Run:
    """What a run left: its folder, its MLflow record and its printed output."""

    folder: Path
    client: mlflow.MlflowClient
    record: Any
    output: str

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) in the order of logging, where a repeated step occurs twice."""
        points = self.client.get_metric_history(self.record.info.run_id, metric)
        return [(point.step, point.value) for point in points]

    def last_values(self, metric: str) -> list[float]:
        """Return the last value of each step."""
        by_step = dict(self.history(metric))
        assert sorted(by_step) == list(range(1, NUM_STEPS + 1))
        return [by_step[step] for step in sorted(by_step)]

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the exported transformer's weights."""
        return load_file(self.folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")

    def weights_at(self, step: int) -> dict[str, torch.Tensor]:
        """Return the weights of a checkpoint that was kept."""
        store = CheckpointStore(str(self.folder / "checkpoints"))
        (manifest,) = [each for each in store.manifests() if each.step == step]
        return checkpoint_weights(store.files(manifest))

    def artifacts(self, folder: str | None = None) -> set[str]:
        """Return the paths of the run's artifacts in a folder."""
        return {item.path for item in self.client.list_artifacts(self.record.info.run_id, folder)}


def changed(run_file: Path, section: str, **values: Any) -> Path:
    """Change keys of one section of a run file, and return its path."""
    run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    run[section] |= values
    run_file.write_text(yaml.safe_dump(run), encoding="utf-8")
    return run_file
