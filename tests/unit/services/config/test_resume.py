"""A run goes on under keys that do not change its training, and under no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config.resume import ResumeError, require_same_training
from services.config.run import RunConfig, load_run_config

TINY = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"


def run(*changes: str) -> RunConfig:
    return load_run_config(TINY, changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.must_fit", "false"),
        ("engine.accelerator", "h100"),
        ("engine.zero_stage", "1"),
        ("engine.heartbeat_minutes", "3"),
        ("checkpoint.every_num_steps", "7"),
        ("num_steps", "80"),
    ],
)
def test_what_does_not_change_the_training_may_change(key: str, value: str) -> None:
    assert set(require_same_training(run(), run(f"{key}={value}"))) == {key}


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "7"), ("rollout.dtype", "bfloat16"), ("optimizer.learning_rate", "1.0"), ("num_steps", "1")],
)
def test_what_changes_the_training_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ResumeError, match=f"{key} "):
        require_same_training(run(), run(f"{key}={value}"))
