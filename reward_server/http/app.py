"""Build the HTTP app of the reward service: its routes and middleware. It imports neither torch nor ray.

The caller passes the function that scores, so the same app runs under Ray Serve, under uvicorn and in tests.
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
from reward_server.http.bytes_in_flight import BytesInFlight
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
    picture_body,
    state_answers,
)
from reward_server.http.pages import add_pages
from reward_server.http.requests import RankRequest, ScoreRequest, read_fields, read_pictures
from reward_server.http.response_headers import ResponseHeaders
from reward_server.metrics import Record, ignore, phase
from reward_server.scoring.reward_info import RewardInfo, RewardList, choose_reward
from reward_server.scoring.threads import in_thread, in_thread_if_large
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
    """Return the application. `rewards`: the served ones, read at every request; `keys`: API keys, () for none."""
    app = FastAPI(title=TITLE, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_middleware(SlowBodies, body_timeout_s=limits.body_timeout_s, chunk_timeout_s=limits.chunk_timeout_s)
    app.add_middleware(RateLimit, requests_per_s=limits.requests_per_s, burst=limits.request_burst)
    app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(ResponseHeaders, record=record)
    app.add_middleware(AccessLog)  # added last, called first: logs refused requests, too
    handle_errors(app, record)
    add_pages(app)
    _add_state(app)
    answers = StoredAnswers(limits.max_stored_answer_bytes, limits.answer_ttl_s)
    in_flight = BytesInFlight(limits.max_bytes_in_flight)
    _add_api(app, _Api(score, rewards, limits, record, answers, in_flight), has_keys=bool(keys))
    return app


def _add_api(app: FastAPI, api: _Api, has_keys: bool) -> None:
    # RequireKey checks the key; this only describes it.
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
        openapi_extra=picture_body(ScoreRequest, num_images=1, with_heat_map=True),
        dependencies=bearer,
    )(api.score_route)
    app.post(
        RANK_PATH,
        summary="Rank pictures",
        response_model=RankAnswer,
        responses=JSON_ANSWERS,
        openapi_extra=picture_body(RankRequest, num_images=2, temperature=0.01),
        dependencies=bearer,
    )(api.rank_route)
    app.get(MODELS_PATH, summary="Served rewards", responses=MODELS_ANSWERS, dependencies=bearer)(api.models_route)


def _add_state(app: FastAPI) -> None:
    @app.get("/healthz", responses=state_answers("alive"))
    async def health() -> Status:
        """Tell that the process answers."""
        return Status(status="alive")

    @app.get(READY_PATH, responses=state_answers("ready"))
    async def ready() -> Status:
        """Tell that the weights are loaded: the app is built only after them."""
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
        """Return rewards of images under their prompt pairs and, on request, the gradient with respect to the images.

        Body and answer are safetensors messages of the layouts below.
        """

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                reward_request = await in_thread_if_large(len(body), RewardRequest.from_bytes, body)
            response = await self._score(request, reward_request)
            with phase(self.record, "encode"):
                content = await in_thread_if_large(len(body), response.to_bytes)
            return Response(content, media_type=MEDIA_TYPE)

        return await self._once(request, idempotency_key, compute)

    async def score_route(self, request: Request, idempotency_key: _IdempotencyKey = None) -> Response:
        """Return rewards of pictures and, on request, a heat map of where a change of each picture moves the reward."""

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                fields = await read_fields(request, body, ScoreRequest, self.limits)
                reward = choose_reward(self.rewards, fields.reward)
                images = await in_thread(read_pictures, fields.images, self.limits)
            response = await self._score(request, fields.to_reward_request(reward.name, images, fields.with_heat_map))
            with phase(self.record, "encode"):
                if fields.with_heat_map:  # megabytes of text
                    return await in_thread(_score_response, response)
                return _score_response(response)

        return await self._once(request, idempotency_key, compute)

    async def rank_route(self, request: Request, idempotency_key: _IdempotencyKey = None) -> Response:
        """Rank pictures by their reward, with the probability that each is preferred to each other one."""

        async def compute(body: bytes) -> Response:
            with phase(self.record, "decode"):
                fields = await read_fields(request, body, RankRequest, self.limits)
                reward = choose_reward(self.rewards, fields.reward)
                temperature = _temperature(fields, reward)
                images = await in_thread(read_pictures, fields.images, self.limits)
            response = await self._score(request, fields.to_reward_request(reward.name, images, with_gradient=False))
            num_bytes = _BYTES_PER_PROBABILITY * len(images) ** 2
            return await in_thread_if_large(num_bytes, _rank_response, response, temperature)

        return await self._once(request, idempotency_key, compute)

    async def models_route(self) -> RewardList:
        """List the served rewards."""
        return RewardList(models=list(self.rewards.values()))

    async def _score(self, request: Request, reward_request: RewardRequest) -> RewardResponse:
        self.limits.check(reward_request)
        names = [choose_reward(self.rewards, reward.name).name for reward in reward_request.rewards]
        request.state.rewards, request.state.num_images = names, len(reward_request.images)  # for the log
        return await self.score(reward_request, request.state.request_id)

    async def _once(
        self, request: Request, key: str | None, compute: Callable[[bytes], Awaitable[Response]]
    ) -> Response:
        """Return the answer to the request's body; with an Idempotency-Key, the stored answer if there is one."""
        with self.in_flight.share() as take:
            body = await _read_body(request, self.limits.max_body_bytes, take)
            if key is None:
                return await compute(body)
            digest = await in_thread_if_large(len(body), _digest, request, body)
            caller = getattr(request.state, "key_fingerprint", "")
            return await self.answers.once(f"{caller} {key}", digest, lambda: compute(body))


def _score_response(response: RewardResponse) -> Response:
    return JSONResponse(score_answer(response).model_dump(exclude_none=True))


def _rank_response(response: RewardResponse, temperature: float) -> Response:
    return JSONResponse(rank_answer(response, temperature).model_dump())


def _temperature(fields: RankRequest, reward: RewardInfo) -> float:
    if fields.temperature is not None:
        return fields.temperature
    if reward.logit_scale is None:
        raise ContractError(f"temperature must be given: reward {reward.name!r} has no logit_scale to take it from")
    return 1 / reward.logit_scale


def _digest(request: Request, body: bytes) -> bytes:
    """Return the digest of all that the answer depends on."""
    digest = hashlib.sha256(body)
    digest.update(f"{request.url.path}\n{request.headers.get('content-type', '')}".encode())
    return digest.digest()


async def _read_body(request: Request, max_bytes: int, take: Callable[[int], None]) -> bytes:
    """Read the whole body. Raise HTTPException 413 before more than max_bytes are held, whatever content-length says.

    take: called with the size of every piece before it is kept; may raise to refuse it.
    """
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_bytes:
            request.state.reject_reason = "max_body_bytes"
            raise HTTPException(HTTP_413_CONTENT_TOO_LARGE, f"body is larger than {max_bytes} bytes; send fewer images")
        take(len(chunk))
        body += chunk
    return bytes(body)
