"""/docs and the OpenAPI description: every route with an example, nothing from elsewhere."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import pytest

from reward_server.scoring.worker import Worker
from services.contract import (
    MEDIA_TYPE,
    MODELS_PATH,
    REWARDS_PATH,
)
from tests.contract.conftest import REQUEST
from tests.contract.http.test_people_api import FILES
from tests.serving import reward_app, serve_app


def test_a_key_opens_the_api_and_its_description_says_so(worker: Worker) -> None:
    with serve_app(reward_app(worker, keys=("open-sesame",))) as url:
        refused = httpx.get(url + "/v1/models", headers={"x-request-id": "mine-2"})
        assert (refused.status_code, refused.headers["x-request-id"]) == (401, "mine-2")
        assert refused.json()["request_id"] == "mine-2"
        assert httpx.get(url + "/v1/models", headers={"authorization": "Bearer open-sesame"}).status_code == 200
        assert httpx.get(url + "/readyz").status_code == 200
        described = httpx.get(url + "/openapi.json").json()
    assert described["paths"]["/v1/rewards"]["post"]["security"] == [{"HTTPBearer": []}]


def test_the_openapi_description_lists_every_route_with_an_example(reward_url: str) -> None:
    """And every example is true."""
    paths = httpx.get(reward_url + "/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/rewards", "/v1/score", "/v1/rank", "/v1/models", "/healthz", "/readyz"}
    for path, (method, route) in ((path, *routes.items()) for path, routes in paths.items()):
        if method == "get":
            example = route["responses"]["200"]["content"]["application/json"]["example"]
            assert example.keys() == httpx.get(reward_url + path).json().keys()
            continue
        for media_type, body in route["requestBody"]["content"].items():
            answer = httpx.post(reward_url + path, **sent_as(media_type, body))
            assert answer.status_code == 200, answer.text
    (info,) = httpx.get(reward_url + MODELS_PATH).json()["models"]
    (example_info,) = paths[MODELS_PATH]["get"]["responses"]["200"]["content"]["application/json"]["example"]["models"]
    assert example_info.keys() == info.keys()


def sent_as(media_type: str, body: dict[str, Any]) -> dict[str, Any]:
    """httpx's arguments for a route's example."""
    if media_type == MEDIA_TYPE:
        header = body["examples"]["header"]["value"].replace("fluent-clip", "tiny-clip").encode()
        num_bytes = json.loads(header)["images"]["data_offsets"][1]
        return {"content": struct.pack("<Q", len(header)) + header + bytes(num_bytes)}
    if media_type == "application/json":
        return {"json": body["example"]}
    assert media_type == "multipart/form-data"
    texts = dict(body["example"])
    return {"files": [("image", (name, FILES[0])) for name in texts.pop("image")], "data": texts}


def test_the_openapi_description_shows_the_answers_header(reward_url: str) -> None:
    route = httpx.get(reward_url + "/openapi.json").json()["paths"][REWARDS_PATH]["post"]
    described = route["responses"]["200"]
    header = json.loads(described["content"][MEDIA_TYPE]["examples"]["header"]["value"])
    answer = httpx.post(reward_url + REWARDS_PATH, content=REQUEST.to_bytes()).content
    sent = json.loads(answer[8 : 8 + int.from_bytes(answer[:8], "little")])
    assert header.keys() == sent.keys()
    assert all(name in described["description"] for name in sent)
    assert json.loads(header["__metadata__"]["message"]).keys() == json.loads(sent["__metadata__"]["message"]).keys()
    assert "text/plain" in route["responses"]["503"]["content"]


PAGE_FILES = ["/", "/docs", "/page.js", "/page.css", "/docs.js", "/swagger-ui-bundle.js", "/swagger-ui.css"]


@pytest.mark.parametrize("path", PAGE_FILES)
def test_pages_come_from_here_and_may_load_nothing_from_elsewhere(reward_url: str, path: str) -> None:
    answer = httpx.get(reward_url + path)
    assert answer.status_code == 200
    suffix = path.rpartition(".")[2] if "." in path else "html"
    assert answer.headers["content-type"].startswith(
        {"js": "text/javascript", "css": "text/css"}.get(suffix, "text/html")
    )
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    if suffix == "html":
        assert "http://" not in answer.text.replace("http://www.w3.org/", "")
        assert "https://" not in answer.text
