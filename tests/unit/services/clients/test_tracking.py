"""The tracker against a real MLflow store, a SQLite file, and against servers that do not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import PIL.Image
import pytest

from services.clients.tracking import Tracker, TrackingError, flatten
from services.config.run import load_run_config

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
BOUND_S = 20.0  # with MLflow's defaults it would be minutes


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # a store in a file puts artifacts below the current folder
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Start a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def absent_server() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_run_keeps_all_that_is_logged(uri: str, tmp_path: Path) -> None:
    config = load_run_config(RUN)
    tracker = Tracker.start(uri, "srpo", config.name, tags={"job": "7"})
    tracker.log_config(config)
    tracker.log_config(config)  # a resumed run logs it again
    tracker.log_metrics({"reward": 0.25, "loss": 0.5}, step=1)
    tracker.log_metrics({"reward": 0.5, "loss": 0.25}, step=2)
    tracker.log_image(PIL.Image.new("RGB", (4, 4)), "samples", step=2)
    tracker.log_file(RUN, "config")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"0")
    tracker.log_model_folder(tmp_path / "weights")
    tracker.set_tag("control_words.positive", "3D")
    tracker.set_tag("mistake", "1")
    for _ in range(2):
        tracker.clear_tag("mistake")
    tracker.finish("FINISHED")

    client = mlflow.MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "tiny_srpo"
    assert run.info.status == "FINISHED"
    assert run.data.params["engine.zero_stage"] == str(config.engine.zero_stage)
    assert set(run.data.params) == set(flatten(config.model_dump(mode="json")))
    assert {"job": "7", "control_words.positive": "3D"}.items() <= run.data.tags.items()
    assert [(each.step, each.value) for each in client.get_metric_history(tracker.run_id, "reward")] == [
        (1, 0.25),
        (2, 0.5),
    ]
    assert [each.path for each in client.list_artifacts(tracker.run_id, "config")] == ["config/tiny_srpo.yaml"]
    assert [each.path for each in client.list_artifacts(tracker.run_id, "model")] == ["model/model.safetensors"]
    assert tracker.tags() == run.data.tags
    assert "mistake" not in tracker.tags()
    assert tracker.history("reward") == {1: 0.25, 2: 0.5}
    (picture,) = tracker.images("samples", tmp_path).items()
    assert (picture[0], PIL.Image.open(picture[1]).size) == (2, (4, 4))


def test_a_resumed_run_is_the_same_run_and_the_latest_of_its_name(uri: str) -> None:
    older, newer = (Tracker.start(uri, "srpo", "twice") for _ in range(2))
    newer.log_metrics({"loss": 1.0}, step=1)
    newer.finish("FAILED")
    resumed = Tracker.resume(uri, newer.run_id)
    resumed.log_metrics({"loss": 2.0}, step=2)
    assert mlflow.MlflowClient(uri).get_run(newer.run_id).info.status == "RUNNING"
    assert len(mlflow.MlflowClient(uri).get_metric_history(newer.run_id, "loss")) == 2
    assert Tracker.latest(uri, "srpo", "twice").run_id == newer.run_id != older.run_id
    assert Tracker.running(uri, "twice").run_id == newer.run_id
    assert Tracker.running(uri, older.run_id).run_id == older.run_id
    newer.finish("FINISHED")
    assert Tracker.running(uri, "twice").run_id == older.run_id


def test_what_does_not_exist_is_named(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="'nobody'"):
        Tracker.latest(uri, "srpo", "nobody")
    with pytest.raises(TrackingError, match="no_such_run"):
        Tracker.resume(uri, "no_such_run")
    tracker = Tracker.start(uri, "srpo", "files")
    with pytest.raises(FileNotFoundError, match="absent"):
        tracker.log_file(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        tracker.log_model_folder(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["absent_server", "silent_server"])
def test_a_server_that_does_not_answer_is_named_in_bounded_time(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    address = request.getfixturevalue(kind)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=f"{address}.*does not answer.*make up"):
        Tracker.start(address, "srpo", "never")
    assert time.monotonic() - began < BOUND_S
