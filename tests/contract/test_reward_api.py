"""The real client against the real app: the same numbers as in-process, and every mistake has its clear answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from reward_server.app import build_app
from reward_server.scorer import Job, Scorer
from reward_server.srp import relative_reward
from services.contract import REWARDS_PATH, PromptPair, RewardRequest, RewardResponse
from services.reward_client import RewardClient, RewardRejected, RewardUnavailable, RewardUnreachable
from tests.contract.conftest import MAX_BODY_BYTES
from tests.serving import serve_app

REQUEST = RewardRequest(
    reward="tiny-clip",
    images=np.random.default_rng(0).random((2, 3, 40, 30), dtype=np.float32),
    pairs=(PromptPair("cat", "3D", "Flat"), PromptPair("dog", "Photo", "Oil")),
    preference_scales=(0.0, 0.3),
)


@pytest.fixture(scope="module")
def client(reward_url: str) -> Iterator[RewardClient]:
    with RewardClient(reward_url, timeout_s=30, max_attempts=1) as client:
        client.wait_until_ready(timeout_s=30)
        yield client


def test_remote_rewards_and_gradient_equal_in_process_autograd(client: RewardClient, scorer: Scorer) -> None:
    served = scorer._rewards["tiny-clip"]
    images = torch.from_numpy(REQUEST.images).requires_grad_()
    local = relative_reward(
        served.model.embed_image(images),
        served.embed_texts([pair.positive_text for pair in REQUEST.pairs]),
        served.embed_texts([pair.negative_text for pair in REQUEST.pairs]),
        torch.tensor(REQUEST.preference_scales),
    )
    loss = torch.relu(0.7 - local.rewards).mean()  # a trainer's loss
    (local_gradient,) = torch.autograd.grad(loss, images)

    response = client.score(REQUEST)
    assert response.image_gradient is not None
    remote_gradient = -response.image_gradient / len(REQUEST.pairs)
    np.testing.assert_allclose(response.rewards, local.rewards.detach(), atol=1e-6)
    np.testing.assert_allclose(remote_gradient, local_gradient, atol=1e-7)


def test_swapped_pairs_negate_the_reward_at_preference_scale_zero(client: RewardClient) -> None:
    there = replace(REQUEST, preference_scales=(0.0, 0.0), with_gradient=False)
    back = replace(there, pairs=tuple(pair.swapped() for pair in there.pairs))
    np.testing.assert_allclose(client.score(there).rewards, -client.score(back).rewards, atol=1e-6)


def test_no_gradient_is_sent_unless_asked_for(client: RewardClient) -> None:
    assert client.score(replace(REQUEST, with_gradient=False)).image_gradient is None


def test_models_are_listed_with_the_checksum_of_their_weights(client: RewardClient, scorer: Scorer) -> None:
    assert client.models() == scorer.versions
    assert client.score(REQUEST).scorer == f"tiny-clip@{scorer.versions['tiny-clip']}"


def test_an_unknown_reward_lists_the_known_ones(client: RewardClient) -> None:
    with pytest.raises(RewardRejected, match="'beauty' is not served here; served: tiny-clip"):
        client.score(replace(REQUEST, reward="beauty"))


def test_a_text_that_is_too_long_is_named(client: RewardClient) -> None:
    wordy = PromptPair("word " * 50, "3D", "Flat")
    with pytest.raises(RewardRejected, match=r"422.*word word"):
        client.score(replace(REQUEST, pairs=(REQUEST.pairs[0], wordy)))


def test_a_body_over_the_limit_is_refused_with_413(client: RewardClient) -> None:
    images = np.zeros((2, 3, 300, 300), np.float32)
    assert images.nbytes > MAX_BODY_BYTES
    with pytest.raises(RewardRejected, match=f"413.*larger than {MAX_BODY_BYTES} bytes"):
        client.score(replace(REQUEST, images=images))


def test_a_body_that_is_no_message_is_refused_with_its_request_id(reward_url: str) -> None:
    answer = httpx.post(reward_url + REWARDS_PATH, content=b"nonsense", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "request_id"}
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"


def test_a_request_id_that_could_forge_log_lines_is_replaced(reward_url: str) -> None:
    forged = "a" * 65
    answer = httpx.get(reward_url + "/healthz", headers={"x-request-id": forged})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] not in ("", forged)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", REWARDS_PATH, 405)])
def test_errors_of_the_framework_have_the_same_form(reward_url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, reward_url + path)
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "request_id"}


def test_an_internal_error_tells_the_log_not_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        raise RuntimeError("secret path")

    with (
        serve_app(build_app(score, {}, MAX_BODY_BYTES)) as url,
        RewardClient(url, max_attempts=1) as client,
        pytest.raises(RewardUnavailable, match="500: internal error") as caught,
    ):
        client.score(REQUEST)
    assert "secret path" not in str(caught.value)
    assert "secret path" in caplog.text


def test_the_openapi_description_lists_every_route(reward_url: str) -> None:
    paths = httpx.get(reward_url + "/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/rewards", "/v1/models", "/healthz", "/readyz"}


class FailsFirst:
    """An ASGI app that answers its first requests with the given statuses, then as the app it wraps."""

    def __init__(self, app: ASGIApp, statuses: list[int]) -> None:
        self._app, self._statuses = app, statuses
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_requests += scope["type"] == "http"
        if scope["type"] == "http" and self._statuses:
            await Response("replica died", status_code=self._statuses.pop(0))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def test_failures_that_pass_are_tried_again(app: ASGIApp, client: RewardClient) -> None:
    failing = FailsFirst(app, [500, 503])
    with serve_app(failing) as url, RewardClient(url, max_attempts=3, backoff_s=0.01) as retrying:
        np.testing.assert_array_equal(retrying.score(REQUEST).rewards, client.score(REQUEST).rewards)
    assert failing.num_requests == 3


def test_attempts_are_bounded(app: ASGIApp) -> None:
    failing = FailsFirst(app, [503] * 10)
    with (
        serve_app(failing) as url,
        RewardClient(url, max_attempts=3, backoff_s=0.01) as client,
        pytest.raises(RewardUnavailable, match="503: replica died"),
    ):
        client.score(REQUEST)
    assert failing.num_requests == 3


def test_a_rejected_request_is_not_tried_again(app: ASGIApp) -> None:
    failing = FailsFirst(app, [])
    with serve_app(failing) as url, RewardClient(url, max_attempts=3) as client, pytest.raises(RewardRejected):
        client.score(replace(REQUEST, reward="beauty"))
    assert failing.num_requests == 1


def test_something_else_at_the_address_is_recognised() -> None:
    page = HTMLResponse("<html>welcome</html>")
    with serve_app(page) as url, RewardClient(url, max_attempts=1) as client:
        with pytest.raises(RewardUnavailable, match="does not speak"):
            client.score(REQUEST)
        with pytest.raises(RewardUnavailable, match="not the reward API"):
            client.models()


def test_an_address_where_nobody_listens_is_named_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    start = time.monotonic()
    with RewardClient(url, max_attempts=3, backoff_s=0.01) as client:
        with pytest.raises(RewardUnreachable, match=rf"{url} does not answer.*make up"):
            client.score(REQUEST)
        with pytest.raises(RewardUnreachable, match=r"no reward service is ready.*make up"):
            client.wait_until_ready(timeout_s=0.2)
    assert time.monotonic() - start < 10


def test_a_service_that_never_answers_is_given_up_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            RewardClient(url, timeout_s=0.2, max_attempts=2, backoff_s=0.01) as client,
            pytest.raises(RewardUnreachable, match="ReadTimeout"),
        ):
            client.score(REQUEST)


def test_score_of_the_scorer_is_what_the_service_answers(client: RewardClient, scorer: Scorer) -> None:
    (local,) = scorer.score([Job(REQUEST, "local")])
    assert isinstance(local, RewardResponse)
    np.testing.assert_allclose(client.score(REQUEST).positive_similarities, local.positive_similarities, atol=1e-6)
