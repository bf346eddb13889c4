"""deploy/serve.yaml's application on a real Ray Serve: batches over callers, and one process that answers it all."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from reward_server.deployment import ServiceArgs, build
from reward_server.models import ClipArgs
from reward_server.scorer import Job, Scorer
from services.contract import PromptPair, RewardRequest, RewardResponse
from services.reward_client import RewardClient, RewardRejected
from tests.tiny_models import make_tiny_clip

SERVE_YAML = Path(__file__).parents[2] / "deploy" / "serve.yaml"
NUM_CALLERS = 6
BATCH_WAIT_S = 0.5


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def client(clip_folder: Path) -> Iterator[RewardClient]:
    """A client of the application of deploy/serve.yaml, with a tiny model and long batches, on a cluster of our own."""
    (application,) = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))["applications"]
    args = application["args"] | {
        "rewards": {"tiny-clip": {"kind": "clip", "path": str(clip_folder)}},
        "batch_wait_s": BATCH_WAIT_S,
        "max_batch_images": 8,
        "max_body_bytes": 1 << 20,
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.TemporaryDirectory(prefix="ray-")  # pytest's own are too long for Ray's socket names
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning", _temp_dir=folder.name)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name=application["name"], route_prefix=application["route_prefix"])
        with RewardClient(f"http://127.0.0.1:{port}", timeout_s=60) as client:
            client.wait_until_ready(timeout_s=60)
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()
        folder.cleanup()


def make_request(seed: int, batch: int, size_px: int = 32) -> RewardRequest:
    images = np.random.default_rng(seed).random((batch, 3, size_px, size_px), dtype=np.float32)
    pairs = tuple(PromptPair(f"subject {seed} {index}", "3D", "Flat") for index in range(batch))
    return RewardRequest("tiny-clip", images, pairs, (0.1,) * batch)


@pytest.mark.slow
def test_callers_at_once_get_what_the_scorer_gives_each_alone(client: RewardClient, clip_folder: Path) -> None:
    scorer = Scorer({"tiny-clip": ClipArgs(kind="clip", path=str(clip_folder))})
    requests = [make_request(seed, batch=1 + seed % 3, size_px=32 + 8 * (seed % 2)) for seed in range(2 * NUM_CALLERS)]
    requests.append(make_request(99, batch=20))  # larger than a batch
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        answers = list(callers.map(client.score, requests))
    for request, remote in zip(requests, answers, strict=True):
        (local,) = scorer.score([Job(request, "local")])
        assert isinstance(local, RewardResponse)
        assert remote.scorer == local.scorer
        np.testing.assert_allclose(remote.rewards, local.rewards, atol=1e-6)
        assert remote.image_gradient is not None
        assert local.image_gradient is not None
        np.testing.assert_allclose(remote.image_gradient, local.image_gradient, atol=1e-6)


@pytest.mark.slow
def test_callers_at_once_share_a_batch(client: RewardClient) -> None:
    requests = [make_request(seed, batch=1) for seed in range(NUM_CALLERS)]
    start = time.monotonic()
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        list(callers.map(client.score, requests))
    assert time.monotonic() - start < NUM_CALLERS * BATCH_WAIT_S  # what batches of one would have waited


@pytest.mark.slow
def test_errors_come_through_the_proxy_as_the_app_wrote_them(client: RewardClient) -> None:
    with pytest.raises(RewardRejected, match="served: tiny-clip"):
        client.score(replace(make_request(0, 1), reward="beauty"))
    with pytest.raises(RewardRejected, match="413"):
        client.score(make_request(0, batch=2, size_px=300))


@pytest.mark.slow
def test_the_service_describes_itself(client: RewardClient) -> None:
    assert list(client.models()) == ["tiny-clip"]
    assert httpx.get(client.url + "/docs").status_code == 200
    assert httpx.get(client.url + "/healthz").json() == {"status": "alive"}


def test_serve_yaml_gives_valid_arguments() -> None:
    config = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))
    assert ServeDeploySchema.model_validate(config).http_options.port == 8000
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert "fluent-clip" in ServiceArgs.model_validate(application["args"]).rewards


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"rewards": {}}, "rewards"),
        ({"rewards": {"a": {"kind": "beauty", "path": "x"}}}, "beauty"),
        ({"rewards": {"a": {"kind": "clip", "path": "x", "pth": "y"}}}, "pth"),
        ({"rewards": {"a": {"kind": "clip", "path": "x"}}, "torch_thread": 1}, "torch_thread"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        build(args)
