"""The routes for people: forms and JSON give what the binary route gives, and each mistake is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.clients.reward import RewardClient
from services.contract import RANK_PATH, SCORE_PATH, PromptPair, RewardRequest, RewardResponse, WeightedReward
from tests.contract.conftest import LIMITS
from tests.serving import reward_app, serve_app

WORDS = {"prompt": "cat", "positive": "3D", "negative": "Flat"}
SIZES_PX = [(40, 30), (24, 56), (8, 8)]  # height, width
PICTURES = [np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8) for index, size in enumerate(SIZES_PX)]


def png(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


FILES = [png(pixels) for pixels in PICTURES]
TEXTS = [base64.b64encode(data).decode() for data in FILES]


@pytest.fixture(scope="module")
def http(reward_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=reward_url, timeout=60) as http:
        yield http


def post_json(http: httpx.Client, path: str = SCORE_PATH, **fields: Any) -> httpx.Response:
    fields = {"images": TEXTS[:1]} | WORDS | fields
    body = json.dumps({name: value for name, value in fields.items() if value is not None})
    return http.post(path, content=body, headers={"content-type": "application/json"})  # httpx's json= refuses NaN


def post_form(http: httpx.Client, files: list[bytes], path: str = SCORE_PATH, **fields: Any) -> httpx.Response:
    return http.post(path, data=WORDS | fields, files=[("image", ("picture", data)) for data in files])


def by_binary_route(reward_url: str, preference_scale: float) -> RewardResponse:
    images = tuple(pixels.transpose(2, 0, 1) for pixels in PICTURES)
    pairs = (PromptPair(**WORDS),) * len(images)
    request = RewardRequest(images, pairs, (preference_scale,) * len(images), (WeightedReward("tiny-clip"),))
    with RewardClient(reward_url) as client:
        return client.score(request)


def test_form_json_and_binary_agree_on_rewards_and_heat_maps(http: httpx.Client, reward_url: str) -> None:
    binary = by_binary_route(reward_url, preference_scale=0.25)
    as_json = post_json(http, images=TEXTS, preference_scale=0.25, reward="tiny-clip", with_heat_map=True)
    as_form = post_form(http, FILES, preference_scale="0.25", with_heat_map="true")
    assert binary.image_gradient is not None
    for answer in (as_json, as_form):
        assert answer.status_code == 200, answer.text
        fields = answer.json()
        assert fields["request_id"] == answer.headers["x-request-id"]
        assert (fields["scorer"],) == binary.scorers
        for index, result in enumerate(fields["results"]):
            assert result["reward"] == pytest.approx(binary.rewards[index], abs=1e-6)
            assert result["positive_similarity"] == pytest.approx(binary.positive_similarities[0, index], abs=1e-6)
            assert result["negative_similarity"] == pytest.approx(binary.negative_similarities[0, index], abs=1e-6)
            gradient = binary.image_gradient[index]
            assert_heat_map(result["heat_map"], "values", np.linalg.norm(gradient, axis=0))
            assert_heat_map(result["heat_map"], "signed", gradient.sum(axis=0))


def assert_heat_map(heat_map: dict[str, Any], member: str, expected: np.ndarray[Any, Any]) -> None:
    values = np.frombuffer(base64.b64decode(heat_map[member]), "<f4")
    np.testing.assert_allclose(values.reshape(heat_map["height_px"], heat_map["width_px"]), expected, atol=1e-6)


def test_no_heat_map_is_made_unless_asked_for(http: httpx.Client) -> None:
    assert "heat_map" not in post_json(http).json()["results"][0]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_score_about_the_same(http: httpx.Client, kind: str) -> None:
    smooth = np.mgrid[0:64, 0:48].transpose(1, 2, 0)[..., [0, 1, 0]].astype(np.uint8) * 3
    rewards = [post_form(http, [png(smooth, each)]).json()["results"][0]["reward"] for each in ("PNG", kind)]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.02)


def test_pictures_are_ranked_by_their_rewards(http: httpx.Client) -> None:
    rewards = [result["reward"] for result in post_json(http, images=TEXTS).json()["results"]]
    answer = post_json(http, RANK_PATH, images=TEXTS, temperature=0.05).json()
    assert answer["order"] == sorted(range(len(TEXTS)), key=lambda index: -rewards[index])
    assert answer["rewards"] == pytest.approx(rewards, abs=1e-6)
    first, last = answer["order"][0], answer["order"][-1]
    expected = 1 / (1 + np.exp((rewards[last] - rewards[first]) / 0.05))
    assert answer["probabilities"][first][last] == pytest.approx(expected, abs=1e-5)


def test_the_temperature_is_the_models_own_unless_given(http: httpx.Client, worker: Worker) -> None:
    logit_scale = worker.infos["tiny-clip"].logit_scale
    assert logit_scale is not None
    answer = post_form(http, FILES, RANK_PATH).json()
    assert answer["temperature"] == pytest.approx(1 / logit_scale)


def test_where_several_rewards_are_served_one_must_be_named(clip: ClipArgs) -> None:
    worker = Worker({"one": clip, "two": clip}, WorkerArgs())
    worker.infos["two"] = worker.infos["two"].model_copy(update={"logit_scale": None})  # as of image-only rewards
    with serve_app(reward_app(worker, LIMITS)) as url, httpx.Client(base_url=url) as http:
        assert post_json(http).json()["error"] == "reward must be given; served: one, two"
        assert post_json(http, reward="one").status_code == 200
        no_scale = post_json(http, RANK_PATH, images=TEXTS, reward="two")
        assert (no_scale.status_code, "temperature must be given" in no_scale.json()["error"]) == (422, True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt: Field required"),
        ({"prompt": " "}, "prompt: "),
        ({"prompt": 3}, "prompt: "),
        ({"prompt": "\ud83d"}, "prompt: "),
        ({"prompt": "x" * 1001}, "prompt has 1001 characters; a text may have at most 1000"),
        ({"images": []}, "images: "),
        ({"images": TEXTS[0]}, "images: "),
        ({"images": [3]}, "images[0] must be a string in base64"),
        ({"images": ["é"]}, "images[0] is not base64"),
        ({"images": [TEXTS[0], TEXTS[0][:-40]]}, "images[1] is damaged or incomplete"),
        ({"images": ["http://127.0.0.1/x.png"]}, "images[0] is not base64"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, "images[0] is not a PNG, JPEG or WebP picture"),
        ({"images": TEXTS[:1] * 9}, "9 images; a request may have at most 8"),
        ({"images": [base64.b64encode(b"GIF89a").decode()] * 9}, "9 images; a request may have at most 8"),
        ({"images": [[]] * 10_000}, "20004 commas and opening brackets; at most 20000 are allowed"),
        ({"preference_scale": "0.1"}, "preference_scale: "),
        ({"preference_scale": 1e300}, "preference_scales[0] must be a finite number"),
        ({"reward": "beauty"}, "'beauty' is not served here; served: tiny-clip"),
        ({"with_heat_map": 2}, "with_heat_map: "),
        ({"x" * 10_000: 1}, "x" * 100),
        ({"url": "http://127.0.0.1/x.png"}, "url: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], named: str) -> None:
    answer = post_json(http, **fields)
    assert answer.status_code == 422
    assert named in answer.json()["error"]
    assert len(answer.json()["error"]) <= 1000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"images": TEXTS[:1]}, "images: "),
        ({"temperature": 0}, "temperature: "),
        ({"temperature": float("nan")}, "temperature: "),
        ({"with_heat_map": True}, "with_heat_map: "),
    ],
)
def test_a_wrong_field_of_a_ranking_is_named(http: httpx.Client, fields: dict[str, Any], named: str) -> None:
    answer = post_json(http, RANK_PATH, **{"images": TEXTS} | fields)
    assert answer.status_code == 422
    assert named in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"[]", b"3", b"[" * 15_000, b"[" * 100_000, b"\xff", b'{"images": {}}'],
)
def test_json_that_is_no_request_is_refused(http: httpx.Client, body: bytes) -> None:
    answer = http.post(SCORE_PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]


def test_a_wrong_form_is_named(http: httpx.Client) -> None:
    named = post_form(http, FILES[:1], positive=["3D", "Photo"])
    assert (named.status_code, "'positive' is unknown or given twice" in named.json()["error"]) == (422, True)
    text = http.post(SCORE_PATH, data=WORDS | {"image": "text"}, files=[("image", ("a", FILES[0]))])
    assert (text.status_code, "send pictures as files named 'image'" in text.json()["error"]) == (422, True)
    other = http.post(SCORE_PATH, data=WORDS, files=[("picture", ("a", FILES[0]))])
    assert (other.status_code, "send pictures as files named 'image'" in other.json()["error"]) == (422, True)
    unknown = post_form(http, FILES[:1], images="text")
    assert (unknown.status_code, "'images' is unknown" in unknown.json()["error"]) == (422, True)
    many = post_form(http, FILES[2:] * 9)
    assert (many.status_code, "more than 8 images; a request may have at most 8" in many.json()["error"]) == (422, True)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused(http: httpx.Client, content_type: str) -> None:
    answer = http.post(SCORE_PATH, content=b"x=1", headers={"content-type": content_type})
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json()["error"]


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_form_in_a_charset_that_cannot_be_decoded_is_refused(http: httpx.Client, charset: str) -> None:
    form = http.build_request("POST", SCORE_PATH, data=WORDS, files=[("image", ("a", FILES[0]))])
    content_type = f"{form.headers['content-type']}; charset={charset}"
    answer = http.post(SCORE_PATH, content=form.read(), headers={"content-type": content_type})
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "request_id"}


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_form_that_cannot_be_parsed_is_refused(http: httpx.Client, content_type: str) -> None:
    answer = http.post(SCORE_PATH, content=b"--x\r\nnonsense", headers={"content-type": content_type})
    assert answer.status_code in (400, 422)
    assert answer.json().keys() == {"error", "request_id"}


def test_a_retried_request_gets_the_stored_answer_but_not_that_of_another_route(http: httpx.Client) -> None:
    key, body = {"idempotency-key": "people-1"}, WORDS | {"images": TEXTS}
    first, again = (http.post(SCORE_PATH, json=body, headers=key) for _ in range(2))
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert http.post(RANK_PATH, json=body, headers=key).status_code == 422
