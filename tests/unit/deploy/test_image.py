"""The container image and what is said of it elsewhere. Building it needs an engine; `make check` lints its file."""

from __future__ import annotations

import re
import tomllib

import yaml

from deploy.settings import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
POD = yaml.safe_load((ROOT / "deploy" / "pod.yaml").read_text(encoding="utf-8"))["spec"]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_one_image_of_this_version_is_named_everywhere() -> None:
    images = [POD["containers"][0]["image"], *(service["image"] for service in COMPOSE["services"].values())]
    assert set(images) == {f"srpo-ray:{VERSION}"}
    assert f"--tag srpo-ray:{VERSION} " in DOCKERFILE


def test_the_image_runs_as_the_user_that_kubernetes_expects() -> None:
    last_user = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1]
    rights = POD["securityContext"]
    assert last_user == f"{rights['runAsUser']}:{rights['runAsGroup']}"
    assert rights["runAsUser"] != 0


def test_both_stages_start_from_one_exact_python() -> None:
    (base,) = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)


def test_no_compiler_is_in_the_last_stage() -> None:
    assert "build-essential" not in DOCKERFILE.split("\nFROM ")[-1]
    assert "apt-get" not in DOCKERFILE.split("\nFROM ")[-1]


def test_what_the_image_needs_is_sent_to_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} | {"deploy", "pyproject.toml"} <= kept
    assert "*" in lines  # everything else stays: no .git, no outputs, no token


def test_containers_on_one_machine_are_confined_too() -> None:
    for service in COMPOSE["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_ray_in_a_container_runs_code_of_those_who_have_its_token() -> None:
    *_, last_stage = DOCKERFILE.split("\nFROM ")
    image = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", last_stage, re.MULTILINE))))
    assert image["RAY_AUTH_MODE"] == COMPOSE["services"]["reward"]["environment"]["RAY_AUTH_MODE"] == "token"
    for service in COMPOSE["services"].values():
        assert "network_mode" in service
        assert "HOME" not in service["environment"]  # the image's
        assert any(mount.startswith(f"{image['HOME']}:") for mount in service["tmpfs"])  # the token is written there
