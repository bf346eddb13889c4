"""Run the reward service on Ray Serve: one deployment with the HTTP app, and one for each reward with `placement: own`.

A request for a reward with `placement: ingress` crosses one hop, from proxy to replica; with `placement: own` it
crosses a second, by handle. `build` is the import path of deploy/serve.yaml, whose `args` are ServiceArgs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Annotated, Any

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram

from reward_server.http.access import check_binding, read_keys
from reward_server.http.access_log import log_as_json
from reward_server.http.app import build_app
from reward_server.http.limits import Limits
from reward_server.metrics import METRICS, Metric
from reward_server.models import AnyArgs, RewardArgs
from reward_server.scoring.batching import Overloaded
from reward_server.scoring.combine import score_all
from reward_server.scoring.reward_info import RewardInfo
from reward_server.scoring.scorer import Job
from reward_server.scoring.worker import Worker, WorkerArgs
from services.contract import REQUEST_ID_HEADER, ContractError, RewardRequest, RewardResponse

Outcome = RewardResponse | ContractError | Overloaded  # returned, not raised: Serve would wrap an exception

# Scoring changes nothing, so a caller may try again after any of these; the service's client does.
_PASSING = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)
# Defaults of both deployments, which deploy/serve.yaml may change. Up to max_ongoing_requests callers share a batch.
_OPTIONS: dict[str, Any] = {"max_ongoing_requests": 128, "graceful_shutdown_timeout_s": 130}


class ServiceArgs(WorkerArgs):
    """`args` in deploy/serve.yaml; an unknown key is an error. The inherited keys hold for each process with models."""

    rewards: Annotated[dict[str, RewardArgs], Field(min_length=1)]  # the name that requests use -> what to load
    limits: Limits = Limits()


def build(args: dict[str, Any]) -> Application:
    """Return the Serve application. Raise pydantic's ValidationError naming the key that is unknown or wrong."""
    checked = ServiceArgs.model_validate(args)
    own = {
        name: OwnReward.options(name=name).bind(name, reward, checked)  # type: ignore[attr-defined]  # serve.deployment
        for name, reward in checked.rewards.items()
        if reward.placement == "own"
    }
    return RewardService.bind(checked, own)  # type: ignore[attr-defined]


@serve.deployment(**_OPTIONS)
class OwnReward:
    """One reward in replicas of its own."""

    def __init__(self, name: str, reward: AnyArgs, args: ServiceArgs) -> None:
        self._name = name
        self._worker = Worker({name: reward}, args, _RayRecord(), _gpu_share([reward]))

    def check_health(self) -> None:
        """Let Serve replace a replica whose GPU answers no more; Serve calls this by name."""
        self._worker.check_health()

    async def score(self, request: RewardRequest, request_id: str) -> tuple[Outcome, RewardInfo]:
        """Return the outcome of the request under this reward, and the description of the loaded reward."""
        outcome: Outcome
        try:
            outcome = await self._worker.score(Job(request, self._name, request_id))
        except (ContractError, Overloaded) as error:
            outcome = error
        return outcome, self._worker.infos[self._name]


@serve.deployment(**_OPTIONS)
@serve.ingress()
class RewardService:
    """The HTTP app with the rewards placed beside it; `__serve_build_asgi_app__` is Serve's late-bound hook."""

    def __init__(self, args: ServiceArgs, own: Mapping[str, DeploymentHandle]) -> None:
        # sys.__stderr__ is Ray's file for this process. sys.stderr is Serve's here: it would search a stack for the
        # caller of each line, wrap the line in its own format, and buffer a thousand of them.
        log_as_json(sys.__stderr__ or sys.stderr)
        self._keys = read_keys(os.environ)
        check_binding(_http_host(), self._keys)
        self._args = args
        self._own = own
        self._record = _RayRecord()
        beside = {name: reward for name, reward in args.rewards.items() if name not in own}
        self._worker = Worker(beside, args, self._record, _gpu_share(beside.values()))
        unloaded = {name: RewardInfo.model_validate({"name": name, "kind": args.rewards[name].kind}) for name in own}
        self._infos = {name: (self._worker.infos | unloaded)[name] for name in args.rewards}

    def __serve_build_asgi_app__(self) -> _OneRequestId:
        return _OneRequestId(build_app(self.score, self._infos, self._args.limits, self._keys, self._record))

    def check_health(self) -> None:
        """Let Serve replace a replica whose GPU answers no more; Serve calls this by name."""
        self._worker.check_health()

    async def score(self, request: RewardRequest, request_id: str) -> RewardResponse:
        """Score all the request's rewards at once and combine them. Raise ContractError or Overloaded."""
        return await score_all(request, lambda reward: self._score_alone(request, reward, request_id))

    async def _score_alone(self, request: RewardRequest, reward: str, request_id: str) -> RewardResponse:
        if reward not in self._own:
            return await self._worker.score(Job(request, reward, request_id))
        try:
            outcome, self._infos[reward] = await self._own[reward].score.remote(request, request_id)
        except _PASSING as error:
            raise Overloaded(f"reward {reward!r} has no replica that takes the request") from error
        if isinstance(outcome, ContractError | Overloaded):
            raise outcome
        return outcome


class _OneRequestId:
    """Removes the header x-request-id, which Serve adds to every answer, so that it is not there twice."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_without_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [each for each in message["headers"] if each[0] != REQUEST_ID_HEADER.encode()]
            await send(message)

        await self._app(scope, receive, send_without_id)


def _http_host() -> str:
    """Return the address on which the proxies and, behind HAProxy, the replicas listen."""
    return serve.context._get_global_client().http_config.host or "0.0.0.0"


def _gpu_share(rewards: Iterable[AnyArgs]) -> float:
    """Return num_gpus of this replica, if a reward is on a GPU. Ray hands out whole cards above 1."""
    if not any(reward.device.startswith("cuda") for reward in rewards):
        return 1.0
    return min(1.0, ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0))


class _RayRecord:
    """Records metrics in Ray's Prometheus export (a metrics.Record); Serve adds application, deployment and replica."""

    def __init__(self) -> None:
        self._record = {metric.name: _recorder(metric) for metric in METRICS}

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._record[metric.name](value, labels)


def _recorder(metric: Metric) -> Callable[[float, Mapping[str, str]], None]:
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.description, tag_keys=metric.labels).inc
        case "gauge":
            return Gauge(metric.name, metric.description, tag_keys=metric.labels).set
        case "histogram":
            boundaries = list(metric.boundaries)
            return Histogram(metric.name, metric.description, boundaries, tag_keys=metric.labels).observe
