"""Delivery to a real MLflow store: everything arrives once, in order, and nothing holds up the rest."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import mlflow
import PIL.Image
import pytest

from services.clients.delivery import Delivery
from services.clients.sending import MAX_POINTS
from services.clients.spool import Spool
from services.clients.spool_file import ATTACHMENTS, read_records
from services.clients.spool_index import RUN_TAG
from services.clients.tracking import Tracker, TrackingError
from tests.mlflow_server import eventually
from tests.recorded import BOUND_S, deliver, log_step, points, recorded_points


def test_everything_arrives_with_the_time_at_which_it_was_recorded(uri: str, spool: Spool, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    (adapter / "deep").mkdir(parents=True)
    for name in ("a.json", "deep/b.bin"):
        (adapter / name).write_text(name, encoding="utf-8")
    (tmp_path / "run.yaml").write_text("name: a", encoding="utf-8")
    spool.log_params({f"key.{number}": number for number in range(150)})
    spool.log_file(tmp_path / "run.yaml")
    spool.log_file(tmp_path / "run.yaml", "config")
    log_step(spool, 1)
    spool.log_image(PIL.Image.new("RGB", (9, 5), "red"), "samples/base", 1)
    spool.log_folder(adapter, "adapter")
    spool.set_tag("warning", "1")
    spool.set_tag("mistake", "1")
    spool.clear_tag("mistake")
    log_step(spool, 2)
    spool.log_metrics("train", {"loss": float("nan"), "reward": 1e300}, 3)
    spool.finish("KILLED")
    spool.resume()
    spool.finish("FAILED")
    delivery = deliver(spool, uri)

    client, run_id = mlflow.MlflowClient(uri), delivery.run_id
    run = client.get_run(run_id)
    records = read_records(spool.folder)
    assert run.info.run_name == "it's a run"
    assert (run.info.start_time, run.info.end_time) == (records[0].time_ms, records[-1].time_ms)
    assert run.info.status == "FAILED"
    assert {
        "job": "7",
        RUN_TAG: str(spool.run),
        "warning": "1",
        "mlflow.loggedImages": "True",
    }.items() <= run.data.tags.items()
    assert "mistake" not in run.data.tags
    assert len(run.data.params) == 150
    assert points(uri, run_id)[:2] == recorded_points(spool)[:2]
    assert len(points(uri, run_id)) == 3
    assert points(uri, run_id, "reward") == recorded_points(spool, "reward")
    tracker = Tracker.open(uri, str(run_id))
    assert PIL.Image.open(tracker.images("samples/base", tmp_path)[1]).size == (9, 5)
    assert len(client.list_artifacts(run_id, "images")) == 2  # the picture and its thumbnail
    paths = [
        each.path
        for folder in ("", "adapter", "adapter/deep", "config")
        for each in client.list_artifacts(run_id, folder)
    ]
    assert {"run.yaml", "config/run.yaml", "adapter/a.json", "adapter/deep/b.bin"} <= set(paths)
    assert delivery.tags() == run.data.tags
    assert delivery.url == tracker.url
    assert list((spool.folder / ATTACHMENTS).iterdir()) == []
    assert Path(client.get_experiment(run.info.experiment_id).artifact_location).is_relative_to(tmp_path)


def test_what_comes_during_the_delivery_arrives_and_before_the_start_there_is_no_run(uri: str, tmp_path: Path) -> None:
    delivery = Delivery(tmp_path, uri)
    with pytest.raises(TrackingError, match="not there yet"):
        delivery.tags()
    assert (delivery.run_id, delivery.url) == (None, None)
    with closing(Spool(tmp_path)) as spool:
        spool.start("srpo", "a", {})
        eventually(lambda: delivery.run_id is not None)
        for step in range(1, 4):
            log_step(spool, step)
            eventually(lambda: delivery.num_left == 0)
            assert points(uri, delivery.run_id) == recorded_points(spool)
        log_step(spool, 4)
        assert delivery.close(BOUND_S) == 0
        assert points(uri, delivery.run_id) == recorded_points(spool)


def test_a_backlog_is_delivered_in_calls_of_a_thousand_numbers(
    uri: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 1301):
        log_step(spool, step)
    sizes = []
    log_batch = mlflow.MlflowClient.log_batch

    def counted(self: mlflow.MlflowClient, run_id: str, metrics: list[object], **rest: object) -> object:
        sizes.append(len(metrics))
        return log_batch(self, run_id, metrics, **rest)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", counted)
    delivery = deliver(spool, uri)
    assert sizes == [MAX_POINTS, MAX_POINTS, 600]
    assert points(uri, delivery.run_id) == recorded_points(spool)


def test_what_mlflow_refuses_is_named_and_holds_nothing_up(
    uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    spool.log_params({"seed": 0})
    for step in (1, 2):
        spool.log_metrics("train", {"loss": 1.0, "clip@b,1": 1.0, "reward": 1.0, "x" * 251: 1.0}, step)
    spool.log_image(PIL.Image.new("RGB", (4, 4)), "samples", 1)
    (picture,) = (spool.folder / ATTACHMENTS).rglob("*.png")
    picture.unlink()
    spool.set_tag("a@b", "1")
    spool.set_tag("good", "1")
    tracker = Tracker.open(uri, str(deliver(spool, uri).run_id))
    assert tracker.history("loss") == tracker.history("reward") == {1: 1.0, 2: 1.0}
    assert tracker.tags()["good"] == "1"
    lines = capsys.readouterr().out.splitlines()
    for what, count in ((f"metric {'clip@b,1'!r}", 2), (f"image {picture.name}", 1), ("tag 'a@b'", 1)):
        assert sum(f"MLflow refuses {what} for good: " in line for line in lines) == 1
        assert sum(f"MLflow has refused {what}, {count} in all: " in line for line in lines) == 1
    assert Delivery(spool.folder, uri).close(BOUND_S) == 0
    assert "MLflow has refused tag" in capsys.readouterr().out  # also in another process: it is noted


def test_a_value_that_only_mlflow_knows_to_refuse_takes_nothing_along(uri: str, spool: Spool) -> None:
    spool.log_params({"seed": 0, "num_steps": 60})
    delivery = deliver(spool, uri)
    mlflow.MlflowClient(uri).log_param(delivery.run_id, "late", "by hand")
    spool.log_params({"early": 1, "late": 2, "later": 3})
    delivery = deliver(spool, uri)
    assert list(delivery.refused) == ["parameter 'late'"]
    params = mlflow.MlflowClient(uri).get_run(delivery.run_id).data.params
    assert params == {"seed": "0", "num_steps": "60", "early": "1", "late": "by hand", "later": "3"}


def test_a_deleted_run_gets_its_record_once_it_is_restored(
    uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = deliver(spool, uri).run_id
    mlflow.MlflowClient(uri).delete_run(run_id)
    log_step(spool, 1)
    delivery = Delivery(spool.folder, uri)
    eventually(lambda: delivery.trouble is not None)
    assert delivery.close(0) == 1
    assert "was deleted: restore it there" in capsys.readouterr().out
    mlflow.MlflowClient(uri).restore_run(run_id)
    delivery = deliver(spool, uri)
    assert (delivery.run_id, delivery.refused) == (run_id, {})
    assert points(uri, run_id) == recorded_points(spool)


def test_a_run_that_was_opened_twice_by_a_lost_answer_is_there_once(uri: str, spool: Spool) -> None:
    first = Tracker.start(uri, "srpo", "it's a run", {RUN_TAG: str(spool.run)}, time_ms=1)
    log_step(spool, 1)
    run_id = deliver(spool, uri).run_id
    assert run_id == first.run_id  # its answer was lost: it is found by its tag
    twin = Tracker.start(uri, "srpo", "it's a run", {RUN_TAG: str(spool.run)}, time_ms=2)  # a request arrives late
    spool.finish("FINISHED")
    deliver(spool, uri)
    assert [each.run_id for each in Tracker.tagged(uri, RUN_TAG, str(spool.run))] == [run_id]
    assert mlflow.MlflowClient(uri).get_run(twin.run_id).info.lifecycle_stage == "deleted"


def test_one_of_two_delivers(uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]) -> None:
    first = Delivery(spool.folder, uri)
    eventually(lambda: first.run_id is not None)
    second = Delivery(spool.folder, uri)
    eventually(lambda: second.trouble is not None)
    log_step(spool, 1)
    assert first.drain(BOUND_S) == 0
    assert second.drain(BOUND_S) == 0
    assert second.run_id == first.run_id
    assert points(uri, first.run_id) == recorded_points(spool)
    assert f"another process delivers the record in {spool.folder}" in capsys.readouterr().out


def test_another_address_of_the_same_mlflow_goes_on_and_another_mlflow_gets_all(
    uri: str, spool: Spool, tmp_path: Path, empty_store: Path
) -> None:
    log_step(spool, 1)
    run_id = deliver(spool, uri).run_id
    log_step(spool, 2)
    (tmp_path / "link.db").symlink_to(tmp_path / "mlflow.db")
    again = deliver(spool, f"sqlite:///{tmp_path / 'link.db'}")
    assert again.run_id == run_id
    assert points(uri, run_id) == recorded_points(spool)
    shutil.copy(empty_store, tmp_path / "other.db")
    other_uri = f"sqlite:///{tmp_path / 'other.db'}"
    other = deliver(spool, other_uri)
    assert other.run_id != run_id
    assert points(other_uri, other.run_id) == recorded_points(spool)


def test_a_folder_that_is_gone_is_refused(uri: str, spool: Spool, tmp_path: Path) -> None:
    spool.log_folder(tmp_path / "absent", "model")
    assert deliver(spool, uri).refused == {"folder model/": [1, f"{tmp_path / 'absent'} is missing"]}


def test_a_store_that_takes_no_files_holds_no_numbers_up(
    uri: str, spool: Spool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deliver(spool, uri)
    store = tmp_path / "mlartifacts"
    store.write_text("no folder can be made here", encoding="utf-8")
    spool.log_image(PIL.Image.new("RGB", (4, 4)), "samples", 1)
    log_step(spool, 1)
    delivery = Delivery(spool.folder, uri)
    eventually(lambda: delivery.trouble is not None)
    assert delivery.close(0) == 1
    assert points(uri, delivery.run_id) == recorded_points(spool)
    assert "takes no files" in capsys.readouterr().out
    store.unlink()
    deliver(spool, uri)
    assert list(Tracker.open(uri, str(delivery.run_id)).images("samples", tmp_path)) == [1]
