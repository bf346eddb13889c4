"""The binary route: the same numbers as in-process, and every mistake or excess has its clear answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.models import ClipArgs, TwoTower, load_reward
from reward_server.scoring.srp import relative_reward, similarity
from reward_server.scoring.worker import Worker
from services.clients.reward import RewardClient, RewardRejected, RewardUnavailable
from services.contract import (
    GRADIENT_DTYPES,
    IDEMPOTENCY_KEY_HEADER,
    MEDIA_TYPE,
    REWARDS_PATH,
    Images,
    PromptPair,
    RewardRequest,
    RewardResponse,
    WeightedReward,
)
from tests.contract.conftest import LIMITS, REQUEST
from tests.serving import serve_app


@pytest.fixture(scope="module")
def client(reward_url: str) -> Iterator[RewardClient]:
    with RewardClient(reward_url, timeout_s=30, max_attempts=1) as client:
        client.wait_until_ready(timeout_s=30)
        yield client


def stacked(images: Images | None) -> Any:
    assert images is not None
    return np.stack(tuple(images))


def test_remote_rewards_and_gradient_equal_in_process_autograd(client: RewardClient, clip: ClipArgs) -> None:
    model = load_reward(clip)
    assert isinstance(model, TwoTower)
    images = torch.from_numpy(stacked(REQUEST.images)).requires_grad_()
    embeds = model.embed_image(images)
    positive, negative = (
        similarity(embeds, model.embed_text(texts))
        for texts in ([pair.positive_text for pair in REQUEST.pairs], [pair.negative_text for pair in REQUEST.pairs])
    )
    local = relative_reward(positive, negative, torch.tensor(REQUEST.preference_scales))
    loss = torch.relu(0.7 - local.rewards).mean()  # a trainer's loss
    (local_gradient,) = torch.autograd.grad(loss, images)

    response = client.score(REQUEST)
    remote_gradient = -stacked(response.image_gradient) / len(REQUEST.pairs)
    np.testing.assert_allclose(response.rewards, local.rewards.detach(), atol=1e-6)
    np.testing.assert_allclose(remote_gradient, local_gradient, atol=1e-7)


def test_swapped_pairs_negate_the_reward_at_preference_scale_zero(client: RewardClient) -> None:
    there = replace(REQUEST, preference_scales=(0.0, 0.0), with_gradient=False)
    back = replace(there, pairs=tuple(pair.swapped() for pair in there.pairs))
    np.testing.assert_allclose(client.score(there).rewards, -client.score(back).rewards, atol=1e-6)


def test_a_word_of_none_is_the_prompt_as_it_is(client: RewardClient, clip: ClipArgs) -> None:
    """As the objective without control words asks: 2 · R − R under the bare prompt."""
    model = load_reward(clip)
    assert isinstance(model, TwoTower)
    bare = tuple(PromptPair(pair.prompt, None, None) for pair in REQUEST.pairs)
    response = client.score(replace(REQUEST, pairs=bare, preference_scales=(1.0, 1.0)))
    with torch.no_grad():
        embeds = model.embed_image(torch.from_numpy(stacked(REQUEST.images)))
        expected = similarity(embeds, model.embed_text([pair.prompt for pair in bare]))
    np.testing.assert_allclose(response.rewards, expected, atol=1e-6)


def test_no_gradient_is_sent_unless_asked_for(client: RewardClient) -> None:
    assert client.score(replace(REQUEST, with_gradient=False)).image_gradient is None


def test_bytes_are_worth_what_their_floats_are(client: RewardClient) -> None:
    in_bytes = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 30), np.uint8)
    in_floats = in_bytes.astype(np.float32) / np.float32(255)
    there, back = (client.score(replace(REQUEST, images=images)) for images in (in_bytes, in_floats))
    np.testing.assert_allclose(there.rewards, back.rewards, atol=1e-6)
    np.testing.assert_allclose(stacked(there.image_gradient), stacked(back.image_gradient), atol=1e-6)


def test_half_precision_images_are_close_to_their_floats(client: RewardClient) -> None:
    half = replace(REQUEST, images=stacked(REQUEST.images).astype(np.float16))
    np.testing.assert_allclose(client.score(half).rewards, client.score(REQUEST).rewards, atol=1e-3)


def test_mixed_sizes_get_what_each_image_gets_alone(client: RewardClient) -> None:
    random = np.random.default_rng(2)
    images = tuple(random.random((3, height, width), dtype=np.float32) for height, width in [(40, 30), (17, 64)])
    together = client.score(replace(REQUEST, images=images))
    assert isinstance(together.image_gradient, tuple)
    for index, image in enumerate(images):
        alone = client.score(
            RewardRequest(
                image[None], REQUEST.pairs[index : index + 1], (REQUEST.preference_scales[index],), REQUEST.rewards
            )
        )
        np.testing.assert_allclose(together.rewards[index], alone.rewards[0], atol=1e-6)
        np.testing.assert_allclose(together.image_gradient[index], stacked(alone.image_gradient)[0], atol=1e-6)


def test_the_gradient_comes_in_the_dtype_asked_for(client: RewardClient) -> None:
    full, half = (
        stacked(client.score(replace(REQUEST, gradient_dtype=name)).image_gradient) for name in GRADIENT_DTYPES
    )
    assert (full.dtype, half.dtype) == (np.float32, np.float16)
    np.testing.assert_allclose(half, full, rtol=1e-3, atol=6e-8)


def test_a_weight_multiplies_reward_and_gradient_but_not_similarities(client: RewardClient) -> None:
    one, three = client.score(REQUEST), client.score(replace(REQUEST, rewards=(WeightedReward("tiny-clip", 3.0),)))
    np.testing.assert_allclose(three.rewards, 3 * one.rewards, atol=1e-6)
    np.testing.assert_allclose(stacked(three.image_gradient), 3 * stacked(one.image_gradient), atol=1e-6)
    np.testing.assert_allclose(three.positive_similarities, one.positive_similarities, atol=1e-6)


def test_models_are_listed_with_the_checksum_of_their_weights(
    client: RewardClient, worker: Worker, reward_url: str
) -> None:
    (described,) = httpx.get(f"{reward_url}/v1/models").json()["models"]
    assert described == worker.infos["tiny-clip"].model_dump()
    assert described["max_text_tokens"] == 48
    assert client.score(REQUEST).scorers == (f"tiny-clip@{described['checksum']}",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rewards": (WeightedReward("beauty"),)}, r"'beauty' is not served here; served: tiny-clip"),
        ({"pairs": (REQUEST.pairs[0], PromptPair("word " * 20, "3D", "Flat"))}, r"422.*tokens.*word word"),
        ({"pairs": (REQUEST.pairs[0], PromptPair("x" * 1001, "3D", "Flat"))}, r"pairs\[1\].prompt has 1001 char.*1000"),
        ({"images": np.zeros((2, 3, 101, 200), np.uint8)}, r"images\[0\] is 200 x 101; .*20000 pixels"),
        ({"images": np.zeros((2, 3, 100, 180), np.uint8)}, r"36000 pixels in all images; .*30000"),
        ({"images": np.zeros((2, 3, 1, 60), np.uint8)}, r"images\[0\] is 60 x 1; .*at most 16 times"),
        ({"images": np.zeros((2, 3, 300, 300), np.float32)}, rf"413.*larger than {LIMITS.max_body_bytes} bytes"),
        (
            {"preference_scales": (0.0, 1e5), "rewards": (WeightedReward("tiny-clip", 3e38),)},
            r"images\[1\] has no finite",
        ),
    ],
)
def test_what_is_wrong_or_too_much_is_named_with_its_numbers(
    client: RewardClient, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(RewardRejected, match=named):
        client.score(replace(REQUEST, **changes))


def test_too_many_images_are_refused(client: RewardClient) -> None:
    images = np.zeros((9, 3, 8, 8), np.uint8)
    request = RewardRequest(images, REQUEST.pairs[:1] * 9, (0.0,) * 9, REQUEST.rewards)
    with pytest.raises(RewardRejected, match=r"422.*9 images; a request may have at most 8"):
        client.score(request)


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(url + REWARDS_PATH, content=body, headers={"content-type": MEDIA_TYPE} | headers)


def test_a_body_that_is_no_message_is_refused_with_its_request_id(reward_url: str) -> None:
    answer = post(reward_url, b"nonsense", **{"x-request-id": "mine-1"})
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "request_id"}
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"


def test_a_body_without_a_length_is_counted_all_the_same(reward_url: str) -> None:
    pieces = (bytes(1 << 16) for _ in range(2 * LIMITS.max_body_bytes >> 16))
    answer = httpx.post(reward_url + REWARDS_PATH, content=pieces)
    assert answer.status_code == 413


@pytest.mark.parametrize("sent", ["", "a" * 129, "two words", "é"])
def test_a_request_id_that_is_not_plain_is_refused(reward_url: str, sent: str) -> None:
    answer = httpx.get(reward_url + "/healthz", headers={b"x-request-id": sent.encode("latin-1")})
    assert answer.status_code == 400
    assert "x-request-id must be 1 to 128 visible ASCII characters" in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"] != sent
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("sent", ["a" * 128, "Root=1-67891233/abc+def:1;x==", '{"message":"forged"}'])
def test_a_plain_request_id_comes_back_as_it_was_sent(reward_url: str, sent: str) -> None:
    answer = post(reward_url, b"nonsense", **{"x-request-id": sent})
    assert answer.status_code == 422
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == sent


def test_a_retried_request_gets_the_stored_answer(reward_url: str) -> None:
    body, key = REQUEST.to_bytes(), {IDEMPOTENCY_KEY_HEADER: "retry-1"}
    first, again = post(reward_url, body, **key), post(reward_url, body, **key)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    other = post(reward_url, replace(REQUEST, with_gradient=False).to_bytes(), **key)
    assert other.status_code == 422
    assert "was already used for another request" in other.json()["error"]


def test_an_error_is_not_stored(reward_url: str) -> None:
    key = {IDEMPOTENCY_KEY_HEADER: "retry-2"}
    assert post(reward_url, b"nonsense", **key).status_code == 422
    assert post(reward_url, REQUEST.to_bytes(), **key).status_code == 200


@pytest.mark.parametrize("key", ["", "a" * 256, "two words"])
def test_an_idempotency_key_that_cannot_be_kept_is_refused(reward_url: str, key: str) -> None:
    answer = post(reward_url, REQUEST.to_bytes(), **{IDEMPOTENCY_KEY_HEADER: key})
    assert answer.status_code == 422
    assert IDEMPOTENCY_KEY_HEADER in answer.json()["error"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", REWARDS_PATH, 405)])
def test_errors_of_the_framework_have_the_same_form(reward_url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, reward_url + path)
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "request_id"}


def test_an_internal_error_tells_the_log_not_the_caller(caplog: pytest.LogCaptureFixture, worker: Worker) -> None:
    async def score(request: RewardRequest, request_id: str) -> RewardResponse:
        raise RuntimeError("secret path")

    with (
        serve_app(build_app(score, worker.infos, Limits())) as url,
        RewardClient(url, max_attempts=1) as client,
        pytest.raises(RewardUnavailable, match="500: internal error") as caught,
    ):
        client.score(REQUEST)
    assert "secret path" not in str(caught.value)
    assert "secret path" in caplog.text
