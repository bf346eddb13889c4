"""A worker runs in a folder of its own: what a run file names must not depend on the current one."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config.run import load_run_config
from trainer.runtime.paths import with_absolute_paths

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///../mlflow.db?timeout=5", "sqlite:///{above}/mlflow.db?timeout=5"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_a_store_in_a_file_becomes_absolute(
    uri: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run_config(RUN)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(config).tracking.uri == absolute.format(here=tmp_path, above=tmp_path.parent)
