"""The HTTP face of the reward service: its routes and what a request passes through. Knows neither torch nor ray.

Whatever scores is handed in as one async function, so the same app runs under Ray Serve, uvicorn and in tests.
Limits, errors, the guard, what people send and what they are told have their own files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Header, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.status import HTTP_413_CONTENT_TOO_LARGE

from reward_server.http.access import RateLimit, RequireKey, SlowBodies
from reward_server.http.access_log import AccessLog
from reward_server.http.answers import RankAnswer, ScoreAnswer, rank_answer, score_answer
from reward_server.http.body_budget import BytesInFlight
from reward_server.http.envelope import Envelope
from reward_server.http.errors import handle_errors
from reward_server.http.idempotency import StoredAnswers
from reward_server.http.limits import Limits
from reward_server.http.openapi import (
    BINARY_ANSWERS,
    BINARY_BODY,
    DESCRIPTION,
    JSON_ANSWERS,
    MODELS_ANSWERS,
    TITLE,
    question_body,
    state_answers,
)
from reward_server.http.pages import add_pages
from reward_server.http.requests import RankQuestion, ScoreQuestion, read_pictures, read_question
from reward_server.metrics import Record, ignore, phase
from reward_server.scoring.catalog import RewardInfo, RewardList, choose_reward
from reward_server.scoring.threads import off_loop, off_loop_if_large
from services.contract import (
    MEDIA_TYPE,
    MODELS_PATH,
    RANK_PATH,
    READY_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    ContractError,
    RewardRequest,
    RewardResponse,
)

Score = Callable[[RewardRequest, str], Awaitable[RewardResponse]]  # request, its id; ContractError or Overloaded
_BYTES_PER_PROBABILITY = 20  # as text

_IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, pattern="^[!-~]+$", examples=["0b9d2c55-1"])
]


class Status(BaseModel):
    status: str


def build_app(
    score: Score,
    rewards: Mapping[str, RewardInfo],
    limits: Limits,
    keys: Collection[str] = (),
    record: Record = ignore,
) -> FastAPI:
    """The application. `rewards`: those served, by name, looked up at every request; `keys`: API keys, () for none."""
    app = FastAPI(title=TITLE, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_middleware(SlowBodies, body_timeout_s=limits.body_timeout_s, chunk_timeout_s=limits.chunk_timeout_s)
    app.add_middleware(RateLimit, requests_per_s=limits.requests_per_s, burst=limits.request_burst)
    app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(Envelope, record=record)
    app.add_middleware(AccessLog)  # added last, asked first: the envelope's refusals are logged too
    handle_errors(app, record)
    add_pages(app)
    _add_state(app)
    answers = StoredAnswers(limits.max_stored_answer_bytes, limits.answer_ttl_s)
    in_flight = BytesInFlight(limits.max_bytes_in_flight)
    _add_api(app, _Api(score, rewards, limits, record, answers, in_flight), has_keys=bool(keys))
    return app


def _add_api(app: FastAPI, api: _Api, has_keys: bool) -> None:
    # RequireKey asks for the key; this only says so in the description.
    bearer = [Security(HTTPBearer(auto_error=False))] if has_keys else []
    app.post(
        REWARDS_PATH,
        summary="Rewards and image gradients",
        response_class=Response,
        responses=BINARY_ANSWERS,
        openapi_extra=BINARY_BODY,
        dependencies=bearer,
    )(api.rewards_route)
    app.post(
        SCORE_PATH,
        summary="Score pictures",
        response_model=ScoreAnswer,
        responses=JSON_ANSWERS,
        openapi_extra=question_body(ScoreQuestion, num_images=1, with_heat_map=True),
        dependencies=bearer,
    )(api.score_route)
    app.post(
        RANK_PATH,
        summary="Rank pictures",
        response_model=RankAnswer,
        responses=JSON_ANSWERS,
        openapi_extra=question_body(RankQuestion, num_images=2, temperature=0.01),
        dependencies=bearer,
    )(api.rank_route)
    app.get(MODELS_PATH, summary="Served rewards", responses=MODELS_ANSWERS, dependencies=bearer)(api.models_route)


def _add_state(app: FastAPI) -> None:
    @app.get("/healthz", responses=state_answers("alive"))
    async def health() -> Status:
        """The process answers."""
        return Status(status="alive")

    @app.get(READY_PATH, responses=state_answers("ready"))
    async def ready() -> Status:
        """The weights are loaded: this app is built only after them."""
        return Status(status="ready")


@dataclass(frozen=True, slots=True)
class _Api:
    """The routes under /v1. Their docstrings are the public description."""

    score: Score
    rewards: Mapping[str, RewardInfo]
    limits: Limits
    record: Record
    answers: StoredAnswers
    in_flight: BytesInFlight

    async def rewards_route(self, request: Request, idempotency_key: _IdempotencyKey = None) -> Response:
        """Rewards of images under their prompt pairs and, on request, the gradient with respect to the images.

        Body and answer are safetensors messages of the layouts below.
        """

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                asked = await off_loop_if_large(len(body), RewardRequest.from_bytes, body)
            answered = await self._score(request, asked)
            with phase(self.record, "encode"):
                content = await off_loop_if_large(len(body), answered.to_bytes)
            return Response(content, media_type=MEDIA_TYPE)

        return await self._once(request, idempotency_key, compute)

    async def score_route(self, request: Request, idempotency_key: _IdempotencyKey = None) -> Response:
        """Rewards of pictures, and on request where in each the reward wants change."""

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                question = await read_question(request, body, ScoreQuestion, self.limits)
                reward = choose_reward(self.rewards, question.reward)
                images = await off_loop(read_pictures, question.images, self.limits)
            answered = await self._score(request, question.request(reward.name, images, question.with_heat_map))
            with phase(self.record, "encode"):
                if question.with_heat_map:  # megabytes of text
                    return await off_loop(_score_response, answered)
                return _score_response(answered)

        return await self._once(request, idempotency_key, compute)

    async def rank_route(self, request: Request, idempotency_key: _IdempotencyKey = None) -> Response:
        """Pictures in the order of their reward, and how probably each is preferred to each other one."""

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                question = await read_question(request, body, RankQuestion, self.limits)
                reward = choose_reward(self.rewards, question.reward)
                temperature = _temperature(question, reward)
                images = await off_loop(read_pictures, question.images, self.limits)
            answered = await self._score(request, question.request(reward.name, images, with_gradient=False))
            num_bytes = _BYTES_PER_PROBABILITY * len(images) ** 2
            return await off_loop_if_large(num_bytes, _rank_response, answered, temperature)

        return await self._once(request, idempotency_key, compute)

    async def models_route(self) -> RewardList:
        """The rewards that may be asked for."""
        return RewardList(models=list(self.rewards.values()))

    async def _score(self, request: Request, asked: RewardRequest) -> RewardResponse:
        self.limits.check(asked)
        names = [choose_reward(self.rewards, reward.name).name for reward in asked.rewards]
        request.state.rewards, request.state.num_images = names, len(asked.images)  # for the log
        return await self.score(asked, request.state.request_id)

    async def _once(
        self, request: Request, key: str | None, compute: Callable[[bytes], Awaitable[Response]]
    ) -> Response:
        """The answer to the request's body; with an Idempotency-Key, the one that it got before."""
        with self.in_flight.share() as take:
            body = await _read_body(request, self.limits.max_body_bytes, take)
            if key is None:
                return await compute(body)
            digest = await off_loop_if_large(len(body), _digest, request, body)
            caller = getattr(request.state, "key_fingerprint", "")
            return await self.answers.once(f"{caller} {key}", digest, lambda: compute(body))


def _score_response(answered: RewardResponse) -> Response:
    return JSONResponse(score_answer(answered).model_dump(exclude_none=True))


def _rank_response(answered: RewardResponse, temperature: float) -> Response:
    return JSONResponse(rank_answer(answered, temperature).model_dump())


def _temperature(question: RankQuestion, reward: RewardInfo) -> float:
    if question.temperature is not None:
        return question.temperature
    if reward.logit_scale is None:
        raise ContractError(f"temperature must be given: reward {reward.name!r} has no scale of its own")
    return 1 / reward.logit_scale


def _digest(request: Request, body: bytes) -> bytes:
    """Of all that the answer depends on."""
    digest = hashlib.sha256(body)
    digest.update(f"{request.url.path}\n{request.headers.get('content-type', '')}".encode())
    return digest.digest()


async def _read_body(request: Request, max_bytes: int, take: Callable[[int], None]) -> bytes:
    """The whole body, never holding more than max_bytes of it: a missing or wrong content-length does not help.

    take: is told of every piece before it is kept, and may refuse it.
    """
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_bytes:
            request.state.reject_reason = "max_body_bytes"
            raise HTTPException(HTTP_413_CONTENT_TOO_LARGE, f"body is larger than {max_bytes} bytes; send fewer images")
        take(len(chunk))
        body += chunk
    return bytes(body)
