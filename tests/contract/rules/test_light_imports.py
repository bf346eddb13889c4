"""Files that everybody imports must not drag a giant along: the command line and every caller would wait for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIGHT = [
    "services.config.run",
    "services.contract",
    "services.wire_format",
    "services.config.reference",
    "services.config.finetune",
    "services.config.method",
    "services.config.objective",
    "services.config.prompts",
    "services.clients.reward",
    "services.commands.score",
    "services.commands.steer",
    "services.config.steering",
    "services.clients.tracking",
    "services.clients.spool",
    "services.clients.delivery",
    "services.commands.sync",
    "services.commands.rank_words",
]
GIANTS = {"torch", "ray", "diffusers", "transformers", "open_clip"}


def modules_imported_by(module: str) -> set[str]:
    program = f"import json, sys; import {module}; print(json.dumps(list(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(finished.stdout.splitlines()[-1]))


def giants_imported_by(module: str) -> set[str]:
    return GIANTS & modules_imported_by(module)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_file_imports_no_giant(module: str) -> None:
    assert giants_imported_by(module) == set()


def test_a_spool_needs_no_mlflow() -> None:
    assert "mlflow" not in modules_imported_by("services.clients.spool")
    assert "mlflow" not in modules_imported_by("services.commands.sync")  # not before it has something to do


def test_the_check_can_fail() -> None:
    assert "torch" in giants_imported_by("reward_server.scoring.srp")
