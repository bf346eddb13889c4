"""`srpo sync`: what a run recorded while MLflow was away arrives later, and what does not is said."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from deploy.settings import free_port
from services.clients.delivered import Delivered
from services.clients.spool import Spool
from services.commands.main import main
from tests.recorded import deliver, log_step, points, recorded_points


@pytest.fixture
def absent_uri(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return f"http://127.0.0.1:{free_port()}"


def test_the_record_of_a_folder_is_delivered_where_the_run_was(
    uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = deliver(spool, uri).run_id
    for step in range(1, 4):
        log_step(spool, step)
    assert main(["sync", str(spool.folder)]) == 0
    assert points(uri, run_id) == recorded_points(spool)
    first, *_, progress, last = capsys.readouterr().out.splitlines()
    assert first == f"3 records in {spool.folder} wait for MLflow at {uri}"
    assert progress == "3 of 3 delivered"
    assert last == f"nothing is left: {uri}/#/experiments/1/runs/{run_id}"
    assert main(["sync", str(spool.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("0 records")


def test_a_run_by_name_whose_mlflow_never_answered(
    uri: str, absent_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = Spool(tmp_path / "out" / "it's" / "run-1")
    (tmp_path / "out" / "it's" / "latest").symlink_to("run-1")
    spool.start("srpo", "it's", {})
    command = ["sync", "it's", "--output-dir", str(tmp_path / "out"), "--timeout-s", "1"]
    assert main(command) == 1
    assert "--tracking-uri" in capsys.readouterr().err  # nothing says where

    spool.log_params({"tracking.uri": absent_uri})
    log_step(spool, 1)
    spool.close()
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"MLflow at {absent_uri} does not answer: the record is kept in" in line for line in lines) == 1
    assert lines[-1].startswith(f"3 records are left in {spool.folder}: MLflow at {absent_uri}")
    assert main([*command, "--tracking-uri", uri]) == 0
    noted = Delivered.load(spool.folder)
    assert noted is not None
    assert points(uri, noted.run_id) == recorded_points(spool)


def test_what_mlflow_refuses_is_a_failure(uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]) -> None:
    spool.set_tag("a@b", "1")
    assert main(["sync", str(spool.folder), "--tracking-uri", uri]) == 1
    assert "MLflow has refused tag 'a@b', 1 in all: " in capsys.readouterr().out


def test_a_record_that_another_process_delivers_is_left_to_it(
    uri: str, spool: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    with (spool.folder / "delivery.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sync", str(spool.folder), "--tracking-uri", uri, "--timeout-s", "1"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"1 records are left in {spool.folder}: another process delivers the record in {spool.folder}"


@pytest.mark.parametrize("run", ["nobody", "."])
def test_a_run_without_a_record_is_named_with_both_places(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sync", run]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"neither {Path(run)} nor {Path('outputs') / run / 'latest'} has spool.jsonl" in line
