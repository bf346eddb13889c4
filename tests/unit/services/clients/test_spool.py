"""The spool: what it took is there after any kill, once, within its bounds; a full disk costs the training nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from services.clients.spool import Spool
from services.clients.spool_file import ATTACHMENTS, FILE, read_records
from services.clients.spool_index import RUN_TAG

OpenSpool = Callable[..., Spool]


@pytest.fixture
def open_spool() -> Iterator[OpenSpool]:
    """Return Spool itself, whose files are closed in the end."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(closing(Spool(*args, **kwargs)))


def noise(size_px: int = 8) -> PIL.Image.Image:
    """Return a picture that no format makes smaller: three bytes a pixel."""
    return PIL.Image.fromarray(np.random.default_rng(size_px).integers(0, 256, (size_px, size_px, 3), np.uint8))


def attachments(folder: Path) -> list[Path]:
    return [each for each in (folder / ATTACHMENTS).rglob("*") if each.is_file()]


def test_everything_is_read_back_in_order_with_the_time_at_which_it_came(tmp_path: Path, open_spool: OpenSpool) -> None:
    (tmp_path / "run.yaml").write_text("name: a", encoding="utf-8")
    before_ms = int(time.time() * 1000)
    spool = open_spool(tmp_path / "run")
    spool.start("srpo", "a", {"job": "7"})
    spool.log_params({"seed": 0, "engine.zero_stage": 2})
    spool.log_metrics("train", {"loss": 0.5, "reward": float("nan")}, step=1)
    spool.log_image(noise(), "samples/base", step=1)
    spool.log_file(tmp_path / "run.yaml", "config")
    spool.log_folder(tmp_path / "adapter", "adapter")
    spool.set_tag("warning", "ž\n")
    spool.clear_tag("warning")
    spool.finish("KILLED")
    spool.resume()
    after_ms = int(time.time() * 1000)
    (tmp_path / "run.yaml").write_text("name: b", encoding="utf-8")

    records = read_records(tmp_path / "run")
    assert [each.sequence for each in records] == list(range(1, 11))
    assert sorted(each.time_ms for each in records) == [each.time_ms for each in records]
    assert all(before_ms <= each.time_ms <= after_ms for each in records)
    start, params, metrics, image, file, folder, tag, cleared, killed, resumed = (each.payload for each in records)
    assert start["tags"] == {"job": "7", RUN_TAG: spool.run}
    assert params == {"params": {"seed": "0", "engine.zero_stage": "2"}}
    assert metrics["values"]["loss"] == 0.5
    assert np.isnan(metrics["values"]["reward"])
    assert (image["key"], image["step"]) == ("samples/base", 1)
    assert f"/samples~base+step+1+timestamp+{records[3].time_ms}+" in image["file"]
    assert PIL.Image.open(tmp_path / "run" / ATTACHMENTS / image["file"]).tobytes() == noise().tobytes()
    assert (tmp_path / "run" / ATTACHMENTS / file["file"]).read_text() == "name: a"
    assert folder == {"path": str(tmp_path / "adapter"), "name": "adapter"}
    assert (tag["value"], cleared["value"], killed["status"], resumed["status"]) == ("ž\n", None, "KILLED", "RUNNING")


def test_a_resumed_training_repeats_steps_and_they_are_there_once(tmp_path: Path, open_spool: OpenSpool) -> None:
    first = open_spool(tmp_path)
    first.start("srpo", "a", {RUN_TAG: "a-1"})
    for step in (1, 2, 3):
        first.log_metrics("train", {"loss": 1 / step, "steering_version": step}, step)
    first.log_image(noise(), "samples", 2)
    first.log_metrics("guard", {"guard/damage": 0.1}, 2)
    first.close()

    second = open_spool(tmp_path)
    second.start("srpo", "a", {RUN_TAG: "another"})
    assert second.run == "a-1"
    assert (second.last_step("train"), second.last_step("guard"), second.last_step("eval")) == (3, 2, None)
    assert second.recorded("train", 2) == {"loss": 0.5, "steering_version": 2}
    assert second.recorded("train", 4) is None
    for step in (2, 3, 4):
        second.log_metrics("train", {"loss": -1.0}, step)
        second.log_image(noise(), "samples", step)
    second.log_metrics("guard", {"guard/damage": -1.0}, 2)
    records = read_records(tmp_path)
    losses = [(each.payload["step"], each.payload["values"].get("loss")) for each in records if each.kind == "metrics"]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, None), (4, -1.0)]
    assert [each.payload["step"] for each in records if each.kind == "image"] == [2, 3, 4]
    assert len(attachments(tmp_path)) == 3


def test_a_changed_parameter_becomes_a_tag(tmp_path: Path, open_spool: OpenSpool) -> None:
    open_spool(tmp_path).log_params({"num_steps": 60, "seed": 0})
    open_spool(tmp_path).log_params({"num_steps": 80, "seed": 0, "new": 1})
    assert [each.payload for each in read_records(tmp_path)][1:] == [
        {"params": {"new": "1"}},
        {"key": "changed.num_steps", "value": "80"},
    ]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool(tmp_path / "whole")
    for step in range(4):
        spool.log_metrics("train", {f"loss_{number}": 1.0 for number in range(1 + 4 * step)}, step)
    whole = (tmp_path / "whole" / FILE).read_bytes()
    ends = [each.end for each in read_records(tmp_path / "whole")]
    for cut in range(ends[1], len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / FILE).write_bytes(whole[:cut])
        again = open_spool(folder)
        again.log_metrics("train", {"loss": 2.0}, 9)
        again.close()
        steps = [each.payload["step"] for each in read_records(folder)]
        assert steps == [step for step in range(4) if ends[step] <= cut] + [9]
        assert (folder / FILE).stat().st_size == read_records(folder)[-1].end
        shutil.rmtree(folder)


def test_a_damaged_line_in_the_middle_is_named_and_the_rest_is_used(
    tmp_path: Path, open_spool: OpenSpool, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = open_spool(tmp_path)
    for step in range(3):
        spool.log_metrics("train", {"loss": 1.0}, step)
    data = (tmp_path / FILE).read_bytes()
    _, second, _ = read_records(tmp_path)
    zeros = bytes(second.end - second.start - 1)
    (tmp_path / FILE).write_bytes(data[: second.start] + zeros + data[second.end - 1 :])
    again = open_spool(tmp_path)
    assert [again.recorded("train", step) is not None for step in range(3)] == [True, False, True]
    assert f"{FILE} is damaged between bytes {second.start} and {second.end}" in capsys.readouterr().out


def test_what_a_killed_process_had_taken_is_there(tmp_path: Path, open_spool: OpenSpool) -> None:
    program = f"""
from pathlib import Path
from services.clients.spool import Spool
spool = Spool(Path({str(tmp_path)!r}))
step = 0
while True:
    step += 1
    spool.log_metrics("train", {{"loss": 1 / step}}, step)
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        taken = [int(writer.stdout.readline()) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        taken += [int(line) for line in writer.stdout.readlines() if line.endswith("\n")]
    spool = open_spool(tmp_path)
    assert spool.last_step("train") in (taken[-1], taken[-1] + 1)
    records = read_records(tmp_path)
    assert [each.payload["step"] for each in records] == [each.sequence for each in records]


def test_two_processes_write_one_after_another(tmp_path: Path, open_spool: OpenSpool) -> None:
    driver, worker = open_spool(tmp_path), open_spool(tmp_path)
    driver.start("srpo", "a", {})
    worker.start("srpo", "a", {})
    worker.log_metrics("train", {"loss": 1.0}, 1)
    driver.log_metrics("train", {"loss": 2.0}, 1)
    driver.finish("FINISHED")
    assert worker.run is not None
    assert [each.sequence for each in read_records(tmp_path)] == [1, 2, 3]
    assert [each.kind for each in read_records(tmp_path)] == ["start", "metrics", "status"]


def test_at_its_limit_pictures_are_left_out_and_then_numbers_too(
    tmp_path: Path, open_spool: OpenSpool, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = open_spool(tmp_path, limit_mib=1)
    picture = noise(512)  # 0.75 MiB
    for step in (1, 2, 3):
        spool.log_image(picture, "samples", step)
        spool.log_metrics("train", {"loss": 1.0}, step)
    assert len(attachments(tmp_path)) == 1
    assert spool.last_step("train") == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: pictures are left out of the record")
    assert str(tmp_path) in line
    assert "1.5 MiB" in line
    assert "tracking.spool_mib is 1" in line

    for number in range(10):
        spool.set_tag(str(number), "x" * 50_000)
    spool.finish("FINISHED")
    sizes = [path.stat().st_size for path in (tmp_path / FILE, *attachments(tmp_path))]
    assert sum(sizes) < 1.1 * 2**20 + 200
    kept = [each.payload["key"] for each in read_records(tmp_path) if each.kind == "tag"]
    assert kept == [str(number) for number in range(len(kept))]
    assert 3 < len(kept) < 10
    assert read_records(tmp_path)[-1].kind == "status"
    (line,) = capsys.readouterr().out.splitlines()
    assert "numbers, tags and files are left out" in line

    shutil.rmtree(attachments(tmp_path)[0].parent)  # as delivery does
    spool.log_image(noise(256), "samples", 4)
    spool.set_tag("again", "x")
    assert [each.kind for each in read_records(tmp_path)[-2:]] == ["image", "tag"]


def limited(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which `limit(bytes)` bounds the size of each file that is written."""
    head = f"""
import resource
from pathlib import Path
from services.clients.spool import Spool
from services.clients.spool_file import FILE, read_records
from tests.unit.services.clients.test_spool import noise
folder = Path({str(folder)!r})
spool = Spool(folder)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""
    return subprocess.run(
        [sys.executable, "-c", head + program], capture_output=True, text=True, check=True, timeout=60
    )


def test_on_a_full_disk_records_wait_in_memory_and_are_written_in_order(tmp_path: Path) -> None:
    finished = limited(
        tmp_path,
        """
import json, time
spool.log_metrics("train", {"loss": 1.0}, 1)
limit((folder / FILE).stat().st_size + 20)
for step in (2, 3, 4):
    spool.log_metrics("train", {"loss": 1 / step}, step)
    spool.set_tag("step", str(step))
assert [each.end for each in read_records(folder)] == [(folder / FILE).stat().st_size]
assert spool.recorded("train", 3) == {"loss": 1 / 3} and spool.last_step("train") == 4
full_ms = time.time() * 1000
limit(resource.RLIM_INFINITY)
spool.log_metrics("train", {"loss": -1.0}, 3)
spool.log_metrics("train", {"loss": 0.2}, 5)
assert all(each.time_ms <= full_ms for each in read_records(folder)[:-1])
spool.close()
""",
    )
    records = read_records(tmp_path)
    assert [each.payload.get("step", each.payload.get("value")) for each in records] == [1, 2, "2", 3, "3", 4, "4", 5]
    assert [each.sequence for each in records] == list(range(1, 9))
    full, written = finished.stdout.splitlines()
    assert str(tmp_path / FILE) in full
    assert os.strerror(27) in full  # file too large: what a limit gives in place of "no space left"
    assert "training goes on" in full
    assert "can be written again" in written


def test_numbers_go_past_a_picture_that_finds_no_room(tmp_path: Path) -> None:
    limited(
        tmp_path,
        """
limit(100_000)
spool.log_image(noise(256), "samples", 1)
spool.log_metrics("train", {"loss": 1.0}, 1)
limit(resource.RLIM_INFINITY)
spool.log_metrics("train", {"loss": 1.0}, 2)
""",
    )
    assert [each.kind for each in read_records(tmp_path)] == ["metrics", "image", "metrics"]
    (path,) = attachments(tmp_path)
    assert PIL.Image.open(path).tobytes() == noise(256).tobytes()


def test_what_is_lost_at_the_end_is_counted(tmp_path: Path) -> None:
    lost = limited(tmp_path, 'limit(0)\nspool.set_tag("a", "1")\nspool.set_tag("b", "2")\nspool.close()\n')
    assert "2 records are lost" in lost.stdout.splitlines()[-1]


def test_a_missing_file_is_named_and_the_training_goes_on(
    tmp_path: Path, open_spool: OpenSpool, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = open_spool(tmp_path)
    spool.log_file(tmp_path / "absent.json")
    assert f"the record lacks {tmp_path / 'absent.json'}: No such file" in capsys.readouterr().out
    assert read_records(tmp_path) == []


def test_an_attachment_without_a_record_is_removed(tmp_path: Path, open_spool: OpenSpool) -> None:
    spool = open_spool(tmp_path)
    spool.log_image(noise(), "samples", 1)
    orphan = tmp_path / ATTACHMENTS / "0123" / "picture.png"
    orphan.parent.mkdir()
    orphan.write_bytes(b"half")
    open_spool(tmp_path)
    assert len(attachments(tmp_path)) == 1
    assert not orphan.parent.exists()
