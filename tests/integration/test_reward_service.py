"""deploy/serve.yaml's application as `make up` runs it: HAProxy, replicas, what they lose (nothing) when they go."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import requests
import yaml

from deploy.local import LocalServices
from deploy.settings import Settings, free_port
from reward_server.metrics import BATCH_IMAGES, IMAGES, REJECTS, TEXT_CACHE_HITS
from reward_server.models import ClipArgs
from reward_server.scoring.combine import combine
from reward_server.scoring.scorer import Job, Scorer
from services.clients.jobs import request_headers
from services.clients.reward import RewardClient, RewardRejected
from services.contract import (
    MODELS_PATH,
    READY_PATH,
    REWARDS_PATH,
    RewardRequest,
    RewardResponse,
)
from tests.integration.reward_requests import (
    AUTHORIZED,
    BESIDE,
    KEY,
    NUM_CALLERS,
    make_request,
    post,
    score_all,
    under_way,
    wait_until,
)
from tests.tiny_models import make_tiny_clip

SERVE_YAML = Path(__file__).parents[2] / "deploy" / "serve.yaml"
MAX_BATCH_IMAGES = 8
APPLICATIONS_PATH = "/api/serve/applications/"  # of the dashboard
APART = "apart-clip"
FORMER_KEY = "former-key"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipArgs]:
    folders = {
        name: make_tiny_clip(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate((BESIDE, APART))
    }
    return {name: ClipArgs(kind="clip", path=str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def scorer(rewards: dict[str, ClipArgs]) -> Scorer:
    return Scorer(rewards)


@pytest.fixture(scope="module")
def services(rewards: dict[str, ClipArgs]) -> Iterator[LocalServices]:
    """deploy/serve.yaml with two tiny models, one in a deployment of its own, a queue of a single batch, and keys."""
    config = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))
    (application,) = config["applications"]
    placed = {name: args.model_dump() for name, args in rewards.items()}
    placed[APART]["placement"] = "own"
    application["args"] |= {
        "rewards": placed,
        "max_batch_images": MAX_BATCH_IMAGES,
        "max_queued_images": MAX_BATCH_IMAGES,
        # a body that waits, unfinished, for another version to be built may pause for longer than a stranger's
        "limits": {"max_body_bytes": 16 << 20, "chunk_timeout_s": 60},
    }
    application["deployments"].append(
        {"name": APART, "autoscaling_config": {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0.1}}
    )
    with tempfile.TemporaryDirectory(prefix="serve-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRPO_API_KEYS", f"{FORMER_KEY},{KEY}")
        folder = Path(name)
        path = folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        services = LocalServices(Settings(free_port(), free_port(), free_port(), folder / "run", path))
        services.up(["ray"])
        try:
            yield services
        finally:
            services.down()


@pytest.fixture(scope="module")
def client(services: LocalServices) -> Iterator[RewardClient]:
    with RewardClient(services.settings.serve_url, api_key=KEY) as client:  # as patient as everybody's
        yield client


def expected(scorer: Scorer, request: RewardRequest) -> RewardResponse:
    answers = scorer.score([Job(request, reward.name, "local") for reward in request.rewards])
    return combine(request, [answer for answer in answers if isinstance(answer, RewardResponse)])


def assert_right(scorer: Scorer, request: RewardRequest, answer: RewardResponse) -> None:
    local = expected(scorer, request)
    assert answer.scorers == local.scorers
    np.testing.assert_allclose(answer.rewards, local.rewards, atol=1e-6)
    np.testing.assert_allclose(np.asarray(answer.image_gradient), np.asarray(local.image_gradient), atol=1e-6)


def replicas(services: LocalServices) -> list[tuple[str, int]]:
    """Return state and process id (0 before it has one) of each replica of the deployment that answers callers."""
    api = f"{services.settings.dashboard_url}{APPLICATIONS_PATH}"
    applications = requests.get(api, headers=request_headers(), timeout=30).json()["applications"]
    deployments = applications.get("reward", {}).get("deployments", {})  # none, while a new version is built
    listed = deployments.get("RewardService", {}).get("replicas", [])
    return [(each["state"], each.get("pid", 0)) for each in listed]


def only_replica(services: LocalServices) -> int:
    """Return the process id of the replica that runs, or 0 as long as another one comes or leaves."""
    match replicas(services):
        case [("RUNNING", pid)]:
            return pid
    return 0


@pytest.mark.slow
def test_callers_at_once_get_what_the_scorer_gives_each_alone(client: RewardClient, scorer: Scorer) -> None:
    sent_requests = [
        make_request(seed, batch=1 + seed % 3, size_px=32 + 8 * (seed % 2)) for seed in range(2 * NUM_CALLERS)
    ]
    sent_requests.append(make_request(99, batch=20))  # larger than a batch, and than the queue
    sent_requests.append(
        replace(make_request(7, 2), images=(np.zeros((3, 32, 40), np.uint8), np.ones((3, 48, 32), np.float32)))
    )
    for request, answer in zip(sent_requests[:-1], score_all(client, sent_requests[:-1]), strict=True):
        assert_right(scorer, request, answer)
    mixed = client.score(sent_requests[-1])
    np.testing.assert_allclose(mixed.rewards, expected(scorer, sent_requests[-1]).rewards, atol=1e-6)


@pytest.mark.slow
def test_a_reward_with_replicas_of_its_own_is_loaded_on_demand_and_combined(
    client: RewardClient, scorer: Scorer
) -> None:
    assert client.models()[APART] is None  # no replica yet
    request = make_request(3, batch=2, rewards={APART: 0.5, BESIDE: -2.0})
    assert_right(scorer, request, client.score(request))
    assert client.models()[APART] == scorer.rewards[APART].model.checksum


@pytest.mark.slow
def test_overload_is_503_with_retry_after_and_a_client_that_obeys_loses_nothing(
    client: RewardClient, scorer: Scorer
) -> None:
    sent_requests = [make_request(seed, batch=MAX_BATCH_IMAGES, size_px=384) for seed in range(2 * NUM_CALLERS)]
    with ThreadPoolExecutor(len(sent_requests)) as callers:
        answers = list(callers.map(lambda request: post(client.url, request), sent_requests))
    refused = [answer for answer in answers if answer.status_code != httpx.codes.OK]
    assert refused, "the queue never filled"
    for answer in refused:
        assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    for request, response in zip(sent_requests, score_all(client, sent_requests), strict=True):
        assert_right(scorer, request, response)


@pytest.mark.slow
def test_callers_share_forwards_as_rays_prometheus_export_tells(services: LocalServices, client: RewardClient) -> None:
    discovery = Path(services.ray.notes()["temp_dir"]) / "prom_metrics_service_discovery.json"

    def value(metric: str, **labels: str) -> float:
        """Summed over replicas; exported every ten seconds."""
        targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
        lines = "".join(requests.get(f"http://{target}/metrics", timeout=10).text for target in targets).splitlines()
        wanted = [f'{name}="{text}"' for name, text in labels.items()]
        found = [line for line in lines if line.startswith(f"ray_{metric}{{") and all(each in line for each in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    num_images = 8 * NUM_CALLERS
    before = value(f"{IMAGES.name}_total", reward=APART)
    score_all(client, [make_request(0, batch=1, rewards={APART: 1.0})] * num_images)
    wait_until(lambda: value(f"{IMAGES.name}_total", reward=APART) >= before + num_images)
    assert value(f"{BATCH_IMAGES.name}_count", reward=APART) < num_images
    assert value(f"{TEXT_CACHE_HITS.name}_total", reward=APART) >= 2 * (num_images - 1)
    assert value(f"{REJECTS.name}_total", reason="overloaded") > 0  # of the test before this one


@pytest.mark.slow
def test_errors_come_through_the_proxy_as_the_app_wrote_them(client: RewardClient) -> None:
    with pytest.raises(RewardRejected, match=f"served: {BESIDE}, {APART}"):
        client.score(make_request(0, 1, rewards={"beauty": 1.0}))
    with pytest.raises(RewardRejected, match="413"):
        client.score(make_request(0, batch=8, size_px=1024))


@pytest.mark.slow
def test_the_keys_of_the_environment_reach_the_replicas(services: LocalServices) -> None:
    url = services.settings.serve_url + MODELS_PATH
    keys = (FORMER_KEY, KEY, "another-key")
    statuses = {key: httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code for key in keys}
    assert statuses == {FORMER_KEY: 200, KEY: 200, "another-key": 401}
    assert httpx.get(url).status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.slow
@pytest.mark.parametrize("sent", [None, "mine-1/a:b=c"])
def test_header_answer_and_log_have_one_request_id(
    services: LocalServices, client: RewardClient, sent: str | None
) -> None:
    headers = AUTHORIZED if sent is None else AUTHORIZED | {"x-request-id": sent}
    answer = httpx.post(client.url + REWARDS_PATH, content=b"nonsense", headers=headers, timeout=120)
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    (request_id,) = answer.headers.get_list("x-request-id")
    assert request_id == answer.json()["request_id"]
    assert sent in (None, request_id)
    logs = Path(services.ray.notes()["temp_dir"]) / "session_latest" / "logs"
    line_part = f'"request_id": "{request_id}"'
    wait_until(lambda: any(line_part in file.read_text() for file in logs.glob("worker-*.err")), timeout_s=10)


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["", "a" * 129])
def test_a_request_id_that_serve_would_repeat_and_the_log_would_not_is_refused(client: RewardClient, sent: str) -> None:
    answer = httpx.get(client.url + READY_PATH, headers={"x-request-id": sent}, timeout=120)
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert "x-request-id must be" in answer.json()["error"]


@pytest.mark.slow
def test_nothing_of_haproxy_listens_beyond_loopback(services: LocalServices) -> None:
    proxies = [each for each in services.ray.members() if each.name() == "haproxy"]
    assert proxies
    for proxy in proxies:
        listening = [each.laddr.ip for each in proxy.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        assert listening
        assert all(ip.startswith("127.") for ip in listening), listening


@pytest.mark.slow
def test_a_replica_that_must_go_answers_what_it_began(
    services: LocalServices, client: RewardClient, scorer: Scorer
) -> None:
    request = make_request(5, batch=2)
    config = yaml.safe_load(services.settings.serve_config.read_text(encoding="utf-8"))
    config["http_options"] |= {"host": "127.0.0.1", "port": services.settings.serve_port}
    config["applications"][0]["args"]["num_cached_texts"] = 99  # another version
    with under_way(client.url, request) as answer:
        api = f"{services.settings.dashboard_url}{APPLICATIONS_PATH}"
        requests.put(api, json=config, headers=request_headers(), timeout=60).raise_for_status()
        wait_until(lambda: "STOPPING" in dict(replicas(services)), timeout_s=60)
    response = answer.result()
    assert response.status_code == httpx.codes.OK, response.text
    assert_right(scorer, request, RewardResponse.from_bytes(response.content))
    client.wait_until_ready(timeout_s=120)


@pytest.mark.slow
def test_killing_a_replica_under_load_loses_no_answer(
    services: LocalServices, client: RewardClient, scorer: Scorer
) -> None:
    sent_requests = [make_request(seed, batch=1 + seed % 4) for seed in range(20 * NUM_CALLERS)]
    has_answered = threading.Event()

    def score(request: RewardRequest) -> RewardResponse:
        answer = client.score(request)
        has_answered.set()
        return answer

    victim = wait_until(lambda: only_replica(services), timeout_s=60)  # an old version has left
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        answers = callers.map(score, sent_requests)
        assert has_answered.wait(timeout=60)
        os.kill(victim, signal.SIGKILL)
        for request, answer in zip(sent_requests, answers, strict=True):
            assert_right(scorer, request, answer)
    assert victim not in [pid for _, pid in replicas(services)]
    assert httpx.get(client.url + READY_PATH).status_code == httpx.codes.OK
