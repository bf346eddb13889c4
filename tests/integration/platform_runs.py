"""Run files for the platform's tests, in a folder of tiny models, and the command as a person starts it there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy.settings import Settings
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, WIDTH_PX

REWARD = "tiny"


def write_run(folder: Path, name: str, positive: str, negative: str, **changes: Any) -> Path:
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    run = {
        "name": name,
        "num_steps": 2,
        "model": {"path": "flux", **size},
        "prompts": {"path": "train.txt"},
        "control_words": {"positive": positive, "negative": negative},
        "rollout": {"num_steps": 2},
        "rewards": [{"name": REWARD}],
        "optimizer": {"learning_rate": 1e-3},
        "engine": {"num_workers": 2, "global_batch": 2},
        "evaluation": {"prompts_path": "heldout.txt", "num_steps": 2, "judge_path": "judge"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run | changes), encoding="utf-8")
    return path


def at(where: Settings) -> dict[str, Any]:
    """The sections of a run file that name the services."""
    return {"reward_service": {"url": where.serve_url}, "tracking": {"uri": where.mlflow_url}}


def srpo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.commands.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
