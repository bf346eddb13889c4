"""deploy/serve.yaml and what the deployment does with its arguments before Ray runs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from deploy.settings import ROOT
from reward_server.deployment import RewardService, ServiceArgs, build
from reward_server.http.access import KEYS_VARIABLE, AccessError
from reward_server.models import WeightsError

SERVE_YAML = ROOT / "deploy" / "serve.yaml"


def test_serve_yaml_gives_valid_arguments() -> None:
    config = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))
    assert ServeDeploySchema.model_validate(config).http_options.port == 8000
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    args = ServiceArgs.model_validate(application["args"])
    assert "fluent-clip" in args.rewards
    (deployment,) = application["deployments"]
    assert deployment["max_ongoing_requests"] >= args.max_batch_images
    assert deployment["graceful_shutdown_timeout_s"] >= config["http_options"]["request_timeout_s"]


def test_what_serve_yaml_offers_in_comments_is_valid_too() -> None:
    text = SERVE_YAML.read_text(encoding="utf-8")
    offered = re.sub(r"(?m)^( +)# (?=(?:- name|[\w.-]+|  \w+): ?[\w{\[])", r"\1", text)
    config = yaml.safe_load(offered)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    args = ServiceArgs.model_validate(application["args"])
    assert {reward.kind for reward in args.rewards.values()} == {"clip", "hpsv2", "pickscore"}
    own = {name for name, reward in args.rewards.items() if reward.placement == "own"}
    assert own == {"hpsv2.1", "pickscore"}
    assert args.max_batch_s is not None
    deployments = {each["name"]: each for each in application["deployments"]}
    assert deployments.keys() == own | {"RewardService"}
    assert deployments["hpsv2.1"]["autoscaling_config"]["min_replicas"] == 0
    parts = [deployments[name]["ray_actor_options"]["num_gpus"] for name in own]
    assert sum(parts) == 1  # of one card


@pytest.mark.parametrize(
    ("host", "keys", "error"),
    [("0.0.0.0", "", AccessError), ("0.0.0.0", "key", WeightsError), ("127.0.0.1", "", WeightsError)],
)
def test_the_deployment_itself_refuses_to_start_beyond_loopback_without_keys(
    host: str, keys: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class without Ray; whoever is let in gets as far as the weights, which are absent here."""
    log = logging.getLogger("reward_server")
    for name in ("handlers", "propagate", "level"):  # which the class changes
        monkeypatch.setattr(log, name, getattr(log, name))
    serves_at = SimpleNamespace(http_config=HTTPOptions(host=host))
    monkeypatch.setattr(serve.context, "_get_global_client", lambda: serves_at)
    monkeypatch.setenv(KEYS_VARIABLE, keys)
    args = ServiceArgs.model_validate({"rewards": {"absent": {"kind": "clip", "path": str(tmp_path / "absent")}}})
    wrapped = RewardService.func_or_class  # type: ignore[attr-defined]  # serve.deployment
    _, plain, *_ = wrapped.__mro__  # ours, below what Serve puts over it
    with pytest.raises(error):
        plain(args, own={})


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"rewards": {}}, "rewards"),
        ({"rewards": {"a": {"kind": "beauty", "path": "x"}}}, "beauty"),
        ({"rewards": {"a": {"kind": "clip", "path": "x", "pth": "y"}}}, "pth"),
        ({"rewards": {"a": {"kind": "clip", "path": "x", "placement": "moon"}}}, "placement"),
        ({"rewards": {"a": {"kind": "clip", "path": "x"}}, "torch_thread": 1}, "torch_thread"),
        ({"rewards": {"a": {"kind": "clip", "path": "x"}}, "limits": {"max_body": 1}}, "max_body"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        build(args)
