"""A reward service of two rewards, and a run file of a tiny model for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from tests.serving import reward_app, serve_app
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from tests.tiny_models import make_tiny_clip


@pytest.fixture(scope="module")
def reward_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    clips = {name: tmp_path_factory.mktemp("clip") for name in ("trained", "held_out")}
    kinds = {
        name: ClipArgs(kind="clip", path=str(make_tiny_clip(clip, seed=len(name)))) for name, clip in clips.items()
    }
    with serve_app(reward_app(Worker(kinds, WorkerArgs()))) as url:
        yield url


@pytest.fixture
def run_file(flux_folder: Path, reward_url: str, tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]), encoding="utf-8")
    size = {"height_px": HEIGHT_PX, "width_px": WIDTH_PX, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    run: dict[str, Any] = {
        "name": "tiny",
        "num_steps": 1,
        "output_dir": str(tmp_path / "outputs"),
        "model": {"path": str(flux_folder), **size},
        "prompts": {"path": str(tmp_path / "prompts.txt")},
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rewards": [{"name": "trained"}],
        "reward_service": {"url": reward_url},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"prompts_path": str(tmp_path / "prompts.txt"), "num_steps": 2, "batch": 3},
        "comparison": {"num_images_per_prompt": 2, "num_draws": 50},
        "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path
