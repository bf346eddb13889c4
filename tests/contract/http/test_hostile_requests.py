"""Thousands of requests that nobody would send by mistake: no 5xx, no word about the inside, no growing memory."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.types import ASGIApp, Message

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.contract import (
    MEDIA_TYPE,
    MODELS_PATH,
    RANK_PATH,
    READY_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    PromptPair,
    RewardRequest,
    WeightedReward,
)
from tests.contract.conftest import LIMITS
from tests.contract.http.test_people_api import FILES, TEXTS, WORDS
from tests.serving import reward_app

NUM_EXAMPLES = 30
NUM_BINARY_BODIES = 10_000
NUM_PEOPLE_BODIES = 2_000
MAX_GROWTH_BYTES = 64 << 20
REWARDS = (WeightedReward("tiny-clip"),)
PAIR = PromptPair(**WORDS)
CHARSETS = ["undefined", "punycode", "idna", "utf-7", "utf-16", "raw_unicode_escape", "rot13", "hex", "x" * 500, "é"]
HOSTILE_VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1e39, float("nan"), float("inf"), "", " ", "\ud800", "x" * 5000,
    "F64", "U8", "BF16", [], {}, [[]], ["a"] * 100, [0, 2**40], [2**32, 2**32], {"a": {"b": []}},
]  # fmt: skip


def valid_bodies() -> list[bytes]:
    chance = np.random.default_rng(0)
    floats = chance.random((2, 3, 8, 8), dtype=np.float32)
    mixed = tuple(chance.integers(0, 256, (3, *size), np.uint8) for size in [(8, 8), (9, 12)])
    requests = [
        RewardRequest(floats, (PAIR,) * 2, (0.0, 0.1), REWARDS, with_gradient=False),
        RewardRequest(floats.astype(np.float16), (PAIR,) * 2, (0.0, 0.1), REWARDS, with_gradient=False),
        RewardRequest(mixed, (PAIR,) * 2, (0.0, 0.1), REWARDS, gradient_dtype="float16"),
    ]
    return [request.to_bytes() for request in requests]


schemathesis.serializer.alias(MEDIA_TYPE, "application/octet-stream")
schemathesis.openapi.media_type(MEDIA_TYPE, st.sampled_from(valid_bodies()) | st.binary())
for kind in ("image/png", "image/jpeg", "image/webp"):
    schemathesis.openapi.media_type(kind, st.sampled_from(FILES))


@pytest.fixture(scope="module")
def app(clip: ClipArgs) -> ASGIApp:
    """One of its own: the session's lives in another event loop."""
    return reward_app(Worker({"tiny-clip": clip}, WorkerArgs()), LIMITS)


@pytest.fixture(scope="module")
def schema(app: ASGIApp) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


# Not positive_data_acceptance: that bytes must be a picture or a message is more than a schema can say.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    allow_header_conformance,
]


ROUTES = [
    ("POST", REWARDS_PATH), ("POST", SCORE_PATH), ("POST", RANK_PATH), ("GET", MODELS_PATH), ("GET", READY_PATH),
    ("GET", "/healthz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[0] == "POST"],  # the others have nothing to vary
)
def test_the_service_is_as_its_openapi_says(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


def test_every_route_described_is_tried(schema: Any) -> None:
    described = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert described == set(ROUTES)


class Caller:
    """Hands requests to the app itself: what a socket would cost is not the subject."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def post(self, path: str, body: bytes, content_type: str) -> tuple[int, bytes]:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", content_type.encode("latin-1"))], "client": ("127.0.0.1", 1), "state": {},
        }  # fmt: skip
        status, answer = 0, b""

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        await self._app(scope, receive, send)
        return status, answer


def mutated_binary(chance: random.Random, bodies: list[bytes]) -> bytes:
    body = chance.choice(bodies)
    mutate = chance.choice([_flip, _cut, _lie_about_length, _change_json, _change_json, _splice])
    return mutate(chance, body, bodies)


def _flip(chance: random.Random, body: bytes, bodies: list[bytes]) -> bytes:
    changed = bytearray(body)
    for _ in range(chance.choice([1, 1, 1, 4, 16])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(chance: random.Random, body: bytes, bodies: list[bytes]) -> bytes:
    start, end = sorted(chance.randrange(len(body) + 1) for _ in range(2))
    return chance.choice([body[:start], body[start:], body[:start] + body[end:], body + body[start:end]])


def _lie_about_length(chance: random.Random, body: bytes, bodies: list[bytes]) -> bytes:
    return struct.pack("<Q", chance.choice([0, 1, len(body), 2**22, 2**32, 2**63, 2**64 - 1])) + body[8:]


def _splice(chance: random.Random, body: bytes, bodies: list[bytes]) -> bytes:
    other = chance.choice(bodies)
    return body[: chance.randrange(len(body))] + other[chance.randrange(len(other)) :]


def _change_json(chance: random.Random, body: bytes, bodies: list[bytes]) -> bytes:
    """A value somewhere in the header, or in the message that it carries, becomes a hostile one."""
    (length,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + length])
    if chance.random() < 0.6:
        message = json.loads(header["__metadata__"]["message"])
        _change(chance, message)
        header["__metadata__"]["message"] = json.dumps(message)
    else:
        _change(chance, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


def _change(chance: random.Random, node: Any) -> None:
    """In place, at a random depth."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(node[key], dict | list) and chance.random() < 0.7:
        _change(chance, node[key])
    elif isinstance(node, dict) and chance.random() < 0.2:
        node[chance.choice(["", "images", "images.0", "images.7", "reward"])] = node.pop(key)
    else:
        node[key] = chance.choice(HOSTILE_VALUES)


def mutated_picture_request(chance: random.Random) -> tuple[str, bytes, str]:
    """Path, body and content type."""
    path = chance.choice([SCORE_PATH, RANK_PATH])
    if chance.random() < 0.5:
        fields: dict[str, Any] = {"images": list(TEXTS), "preference_scale": 0.1} | WORDS
        if chance.random() < 0.5:
            _change(chance, fields)
        else:
            fields["images"][0] = b64encode(_flip(chance, FILES[0], [])).decode()
        return path, json.dumps(fields).encode(), "application/json"
    parts = [f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in WORDS.items()]
    file = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
    body = "".join(parts).encode() + b"".join(file + data + b"\r\n" for data in FILES[:2]) + b"--x--\r\n"
    content_type = "multipart/form-data; boundary=x"
    if chance.random() < 0.3:
        content_type += f"; charset={chance.choice(CHARSETS)}"
        if chance.random() < 0.5:
            return path, body, content_type
    if chance.random() < 0.1:
        content_type = _flip(chance, content_type.encode(), []).decode("latin-1")
    return path, chance.choice([_flip, _cut])(chance, body, [body]), content_type


def assert_harmless(app: ASGIApp, requests: Iterator[tuple[str, bytes, str]], allowed: set[int]) -> None:
    """Every answer is one of a refusal or a success, and the later ones do not make the process larger."""
    process, sizes, statuses = psutil.Process(), [], []

    async def send_all() -> None:
        caller = Caller(app)
        for index, (path, body, content_type) in enumerate(requests):
            status, answer = await caller.post(path, body, content_type)
            assert status in allowed, (status, path, body[:500])
            if status != 200:
                fields = json.loads(answer)
                assert fields.keys() == {"error", "request_id"}
                assert len(fields["error"]) < 2000
                assert not any(word in fields["error"] for word in ("Traceback", ".py", "site-packages", "/work"))
            statuses.append(status)
            if index % 100 == 0:
                sizes.append(process.memory_info().rss)

    asyncio.run(send_all())
    assert len(set(statuses)) > 1  # some were refused and some were not
    assert max(sizes) - max(sizes[: len(sizes) // 4]) < MAX_GROWTH_BYTES, sizes  # a quarter is for caches to fill


@pytest.mark.slow
def test_mutated_binary_bodies_do_no_harm(app: ASGIApp) -> None:
    chance, bodies = random.Random(0), valid_bodies()
    requests = ((REWARDS_PATH, mutated_binary(chance, bodies), MEDIA_TYPE) for _ in range(NUM_BINARY_BODIES))
    assert_harmless(app, requests, {200, 422})


@pytest.mark.slow
def test_mutated_questions_do_no_harm(app: ASGIApp) -> None:
    chance = random.Random(1)
    requests = (mutated_picture_request(chance) for _ in range(NUM_PEOPLE_BODIES))
    assert_harmless(app, requests, {200, 400, 413, 415, 422})
