"""The guarded app on a real socket: who is let in, who is sent away and how, and what the log says of it."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from reward_server.http.access import key_fingerprint
from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.scoring.worker import Worker
from services.contract import (
    MODELS_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    PromptPair,
    RewardRequest,
    RewardResponse,
    WeightedReward,
)
from tests.serving import reward_app, serve_app

OLD, NEW = "old-key-0123456789", "new-key-0123456789"
PROMPT = 'a cat\n{"message": "forged"}'
BODY = RewardRequest(
    images=np.zeros((2, 3, 16, 16), np.float32),
    pairs=(PromptPair(PROMPT, "3D", "Flat"),) * 2,
    preference_scales=(0.0, 0.0),
    rewards=(WeightedReward("tiny-clip"),),
).to_bytes()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded_url(worker: Worker) -> Iterator[str]:
    with serve_app(reward_app(worker, keys=(OLD, NEW))) as url:
        yield url


def test_without_a_key_the_answer_says_which_header_is_missing(guarded_url: str) -> None:
    answer = httpx.post(guarded_url + REWARDS_PATH, content=BODY)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("key", [OLD, NEW])
def test_each_key_opens_the_api(guarded_url: str, key: str) -> None:
    assert httpx.post(guarded_url + REWARDS_PATH, content=BODY, headers=bearer(key), timeout=30).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz"])
def test_page_documentation_and_probes_need_no_key(guarded_url: str, path: str) -> None:
    assert httpx.get(guarded_url + path).status_code == 200


def test_no_route_of_the_api_is_left_open(guarded_url: str) -> None:
    paths = httpx.get(guarded_url + "/openapi.json").json()["paths"]
    closed = [path for path in paths if path.startswith("/v1")]
    assert len(closed) >= 4
    for path in closed:
        for method in paths[path]:
            assert httpx.request(method, guarded_url + path).status_code == 401


def test_one_key_s_flood_is_turned_away_and_the_other_key_still_served(worker: Worker) -> None:
    limits = Limits(requests_per_s=0.01, request_burst=2)
    with serve_app(reward_app(worker, limits, keys=(OLD, NEW))) as url:
        answers = [httpx.get(url + MODELS_PATH, headers=bearer(OLD)) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 0 < int(answers[-1].headers["retry-after"]) <= 100
        assert httpx.get(url + MODELS_PATH, headers=bearer(NEW)).status_code == 200
        assert httpx.get(url + "/readyz", headers=bearer(OLD)).status_code == 200


def send_slowly(url: str, path: str, pause_s: float | None) -> tuple[int, dict[str, Any], float]:
    """Status, error and seconds for a body of which a byte comes every pause_s (None: only the first one comes)."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    began, received = time.monotonic(), b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + b"x")
        connection.settimeout(pause_s or 10)
        while True:
            try:
                piece = connection.recv(4096)
            except TimeoutError:
                connection.sendall(b"x")
                continue
            received += piece
            if not piece:  # the service closed the connection
                break
    answer_head, _, body = received.partition(b"\r\n\r\n")
    return int(answer_head.split()[1]), json.loads(body), time.monotonic() - began


@pytest.mark.parametrize("path", [REWARDS_PATH, SCORE_PATH])
@pytest.mark.parametrize("pause_s", [None, 0.05])
def test_a_body_that_trickles_is_given_up_and_its_connection_closed(
    worker: Worker, path: str, pause_s: float | None
) -> None:
    limits = Limits(body_timeout_s=1.0, chunk_timeout_s=0.3)
    with serve_app(reward_app(worker, limits)) as url:
        status, answer, seconds = send_slowly(url, path, pause_s)
        assert httpx.get(url + "/readyz").status_code == 200
    assert status == 408
    assert answer.keys() == {"error", "request_id"}
    assert "too slowly" in answer["error"]
    assert (0.3 if pause_s is None else 1.0) <= seconds < 60


def lines_of(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_every_module_of_the_service_logs_in_json(log: io.StringIO) -> None:
    logging.getLogger("reward_server.scoring.batching").warning("a batch failed")
    (line,) = lines_of(log)
    assert (line["level"], line["message"]) == ("WARNING", "a batch failed")


def test_a_request_is_one_line_of_json(worker: Worker, log: io.StringIO) -> None:
    headers = bearer(NEW) | {"x-request-id": "mine-1"}
    with serve_app(reward_app(worker, keys=(OLD, NEW))) as url:  # its end has seen every line written
        answer = httpx.post(url + REWARDS_PATH, content=BODY, headers=headers, timeout=30)
    (line,) = lines_of(log)
    assert 0 < line.pop("seconds") < 30
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "reward_server.http.access_log",
        "message": "request",
        "request_id": "mine-1",
        "key_fingerprint": key_fingerprint(NEW),
        "rewards": ["tiny-clip"],
        "num_images": 2,
        "method": "POST",
        "route": REWARDS_PATH,
        "status": 200,
        "bytes_in": len(BODY),
        "bytes_out": len(answer.content),
    }


def test_refusals_are_logged_too_and_nothing_that_the_caller_wrote(worker: Worker, log: io.StringIO) -> None:
    with serve_app(reward_app(worker, keys=(OLD, NEW))) as url:
        httpx.post(url + REWARDS_PATH, content=BODY, headers=bearer(OLD), timeout=30)
        httpx.post(url + REWARDS_PATH, content=BODY, headers=bearer("wrong-key"))
        httpx.get(url + '/v1/%0a{"message": "forged"}', headers=bearer(OLD))
        httpx.get(url + "/nowhere%0d%0aforged")
    statuses = [(line["status"], line["route"]) for line in lines_of(log)]
    assert statuses == [(200, REWARDS_PATH), (401, None), (404, None), (404, None)]
    assert not any(text in log.getvalue() for text in ("forged", "cat", OLD, NEW, "wrong-key"))


def test_an_internal_error_is_one_line_with_its_traceback(worker: Worker, log: io.StringIO) -> None:
    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        raise RuntimeError('first\n{"message": "forged"}\u2028\x1b[2J')

    with serve_app(build_app(score, worker.infos, Limits())) as url:
        answer = httpx.post(url + REWARDS_PATH, content=BODY)
    assert answer.status_code == 500
    request, error = lines_of(log)
    assert (request["message"], request["status"]) == ("request", 500)
    assert (error["message"], error["request_id"]) == ("request failed", answer.headers["x-request-id"])
    assert '{"message": "forged"}' in error["exception"]
    assert log.getvalue().isascii()
