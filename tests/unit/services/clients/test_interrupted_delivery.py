"""Delivery whose process is killed, or whose MLflow server is away, frozen or killed: nothing is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import PIL.Image
import pytest

from services.clients.delivery import Delivery
from services.clients.spool import Spool
from services.clients.spool_file import ATTACHMENTS
from services.clients.spool_index import RUN_TAG
from services.clients.tracking import Tracker
from tests.mlflow_server import MlflowServer, eventually
from tests.recorded import BOUND_S, deliver, log_step, points, recorded_points

BUSY_S = 10.0  # a busy machine takes its time; to wait for MLflow would take a minute
KILLED_ONCE_A_RECORD = """
import os, signal, sys
from pathlib import Path
import mlflow
from services.clients.delivery import Delivery

folder, uri = Path(sys.argv[1]), sys.argv[2]

class Killed(Delivery):
    num_notes = 0
    def _note(self, state):
        self.num_notes += 1
        if self.num_notes == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._note(state)

num_kills = 0
while True:
    child = os.fork()  # imports MLflow once for all of them
    if child == 0:
        os._exit(min(Killed(folder, uri).close(60), 1))
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(num_kills)
        sys.exit(os.WEXITSTATUS(status))
    num_kills += 1
"""


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_process_killed_between_each_delivery_and_its_note_doubles_nothing(
    store: str, uri: str, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's file store doubles a number that is sent twice, so that this fails if nothing is looked up."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    uri = uri if store == "sqlite" else f"file://{tmp_path / 'store'}"
    spool.log_params({"seed": 0})
    for step in range(1, 3):
        log_step(spool, step)
        spool.log_image(PIL.Image.new("RGB", (4, 4)), "samples", step)
        spool.set_tag("step", str(step))
    spool.finish("FINISHED")
    command = [sys.executable, "-c", KILLED_ONCE_A_RECORD, str(spool.folder), uri]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(finished.stdout.splitlines()[-1]) == 8  # all records but the first of all

    (tracker,) = Tracker.tagged(uri, RUN_TAG, str(spool.run))
    for metric in ("loss", "reward"):
        assert points(uri, tracker.run_id, metric) == recorded_points(spool, metric)
    client = mlflow.MlflowClient(uri)
    assert len(client.list_artifacts(tracker.run_id, "images")) == 4
    assert sorted(tracker.images("samples", tmp_path)) == [1, 2]
    assert tracker.tags()["step"] == "2"
    assert client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_lost_note_doubles_nothing(uri: str, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path / 'store'}"
    for step in range(1, 4):
        log_step(spool, step)
        spool.log_image(PIL.Image.new("RGB", (4, 4)), "samples", step)
    run_id = deliver(spool, uri).run_id
    (spool.folder / "delivered").write_text("{", encoding="utf-8")
    again = deliver(spool, uri)
    assert (again.run_id, again.refused) == (run_id, {})
    assert points(uri, run_id) == recorded_points(spool)


@pytest.mark.parametrize("signal_name", ["frozen", "absent"])
def test_a_program_ends_in_time_though_mlflow_does_not_answer(
    signal_name: str, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import socket, sys, time
from pathlib import Path
from services.clients.delivery import Delivery
with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts, and never answers
    if {signal_name!r} == "absent":
        listener.close()
        address = "http://127.0.0.1:9"
    else:
        address = f"http://127.0.0.1:{{listener.getsockname()[1]}}"
    delivery = Delivery(Path({str(spool.folder)!r}), address)
    began = time.monotonic()
    left = delivery.close(timeout_s=1.0)
    print(left, time.monotonic() - began)
    ended = time.time()
print(ended)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    exited = time.time()
    *_, numbers, ended = finished.stdout.splitlines()
    left, seconds = numbers.split()
    assert (left, float(seconds) < BUSY_S) == ("1", True)
    assert exited - float(ended) < BUSY_S  # no thread keeps the process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Return a server that a test starts, freezes and kills as it likes."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def assert_complete(delivery: Delivery, spool: Spool, num_outages: int, printed: str) -> None:
    """Every number has arrived once, and each outage was told in two lines."""
    uri, run_id = delivery.uri, delivery.run_id
    assert [each.run_id for each in Tracker.tagged(uri, RUN_TAG, str(spool.run))] == [run_id]
    for metric in ("loss", "reward"):
        assert points(uri, run_id, metric) == recorded_points(spool, metric)
    assert Tracker.open(uri, str(run_id)).tags()["step"] == str(spool.last_step("train"))
    away = f"MLflow at {uri} does not answer: the record is kept in {spool.folder} and delivered when it does"
    assert printed.count(away) == num_outages
    assert printed.count(f"MLflow at {uri} answers again: delivered ") == num_outages


def train(spool: Spool, steps: range) -> None:
    for step in steps:
        log_step(spool, step)
        spool.set_tag("step", str(step))
        if step % 5 == 0:
            spool.log_image(PIL.Image.new("RGB", (4, 4)), "samples", step)


@pytest.mark.usefixtures("impatient")
def test_mlflow_down_at_the_start(spool: Spool, server: MlflowServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.kill()
    delivery = Delivery(spool.folder, server.uri)
    began = time.monotonic()
    train(spool, range(1, 21))
    assert time.monotonic() - began < BUSY_S  # the training does not wait
    eventually(lambda: delivery.trouble is not None)
    assert delivery.num_left == 45
    server.start()
    assert delivery.drain(BOUND_S) == 0
    assert_complete(delivery, spool, 1, capsys.readouterr().out)


@pytest.mark.usefixtures("impatient")
def test_mlflow_frozen_in_the_middle(spool: Spool, server: MlflowServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.start()
    delivery = Delivery(spool.folder, server.uri)
    train(spool, range(1, 6))
    eventually(lambda: delivery.num_left == 0)
    server.freeze()
    train(spool, range(6, 16))
    eventually(lambda: delivery.trouble is not None)
    server.thaw()
    train(spool, range(16, 21))
    assert delivery.drain(BOUND_S) == 0
    assert_complete(delivery, spool, 1, capsys.readouterr().out)


@pytest.mark.usefixtures("impatient")
def test_mlflow_killed_and_started_again(
    spool: Spool, server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    delivery = Delivery(spool.folder, server.uri)
    train(spool, range(1, 6))
    eventually(lambda: delivery.run_id is not None)
    server.kill()  # also in the middle of a call
    train(spool, range(6, 16))
    eventually(lambda: delivery.trouble is not None)
    server.start()
    train(spool, range(16, 21))
    assert delivery.drain(BOUND_S) == 0
    assert_complete(delivery, spool, 1, capsys.readouterr().out)
    assert list((spool.folder / ATTACHMENTS).iterdir()) == []
