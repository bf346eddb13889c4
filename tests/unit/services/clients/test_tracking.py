"""The tracker against a real MLflow store, a SQLite file, and against servers that do not answer."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import PIL.Image
import pytest

from services.clients.tracking import RefusedError, Tracker, TrackingError, check_metric_name, flatten
from services.clients.tracking_errors import UnansweredError
from services.config.run import load_run_config

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
BOUND_S = 20.0  # with MLflow's defaults it would be minutes


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


@pytest.mark.parametrize(
    "name", ["it's", 'say "no"', "both ' and \"", "ends'", "100%", "back\\slash", "a_b", "tick`", "' or '1"]
)
def test_a_run_of_any_name_is_found(name: str, uri: str) -> None:
    Tracker.start(uri, "srpo", name, {"srpo.run": f"{name}{name}"})
    run = Tracker.start(uri, "srpo", name, {"srpo.run": name})
    if (alike := re.sub("['\"]", "x", name)) != name:  # MLflow is asked for any character there
        Tracker.start(uri, "srpo", alike, {"srpo.run": alike})
    assert Tracker.latest(uri, "srpo", name).run_id == Tracker.running(uri, name).run_id == run.run_id
    assert [each.run_id for each in Tracker.tagged(uri, "srpo.run", name)] == [run.run_id]
    assert Tracker.tagged(uri, "srpo.run", "none ' of them") == []


NAMES = ["loss", "reward/hpsv2.1", "a b", "ž", "a:b", "a-b_c.d", "x" * 250]
NO_NAMES = ["clip@b,1", "", "/a", "a/", "a//b", "../a", "a/../b", ".", "./a", "a\n", "a'b", "x" * 251]


@pytest.mark.parametrize("name", NAMES + NO_NAMES)
def test_names_that_mlflow_refuses_are_known_before(name: str, uri: str) -> None:
    tracker = Tracker.start(uri, "srpo", "names")
    if name in NAMES:
        check_metric_name(name)
        tracker.log_metrics({name: 1.0}, step=1)
        return
    with pytest.raises(ValueError, match=r"MLflow takes no metric named .*(letters, digits|path|250)"):
        check_metric_name(name)
    if name != "a\n":  # MLflow's pattern overlooks a line break at the end
        with pytest.raises(RefusedError, match="cannot log step 1: "):
            tracker.log_metrics({name: 1.0}, step=1)


@pytest.mark.parametrize("kind", ["absent_server", "silent_server"])
def test_a_server_that_does_not_answer_is_named_in_bounded_time(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    address = request.getfixturevalue(kind)
    began = time.monotonic()
    with pytest.raises(UnansweredError, match=f"{address}.*does not answer.*make up"):
        Tracker.start(address, "srpo", "never")
    assert time.monotonic() - began < BOUND_S
