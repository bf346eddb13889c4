"""Checkpoints are complete or absent, in a folder and on a real S3 server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3  # type: ignore[import-untyped]
import pytest
from moto.server import ThreadedMotoServer

from services.clients.checkpoint_store import CheckpointError, CheckpointStore, Manifest
from trainer.runtime.checkpoint_writer import CheckpointWriter, replaced

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Start an S3 server, and return the URI of a bucket there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
            client.create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}/{{folder}}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        finally:
            server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "folder":
        return CheckpointStore(str(tmp_path / "checkpoints"))
    return CheckpointStore(request.getfixturevalue("s3").format(folder=uuid4().hex))


class Part:
    """A worker's part that is a file of some bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def save(self, path: Path) -> None:
        path.write_bytes(self.content)


def save(store: CheckpointStore, step: int, num_workers: int = 2, attempt: str = "a", best: int | None = None) -> None:
    """Save a checkpoint as `num_workers` workers do that are threads here."""
    writers = [CheckpointWriter(store, rank, num_workers, attempt, num_kept=2) for rank in range(num_workers)]
    for rank, writer in enumerate(writers):
        writer.write(Part(f"{step} of {rank}".encode() * 1000), {"step": step, "time": step}, best)
    for writer in writers:
        writer.settle(agree=bool)


def contents(store: CheckpointStore, manifest: Manifest) -> list[bytes]:
    read = []
    for place in store.files(manifest):
        with place.open("rb") as file:
            read.append(file.read())
    return read


def test_what_was_saved_is_read_back(store: CheckpointStore) -> None:
    assert store.manifests() == []
    save(store, step=10)
    (manifest,) = store.manifests()
    assert (manifest.step, store.damage(manifest)) == (10, None)
    assert contents(store, manifest) == [b"10 of 0" * 1000, b"10 of 1" * 1000]
    with store.files(manifest)[1].open("rb") as file:
        file.seek(7 * 999 + 3)
        assert file.read(4) == b"of 1"


def test_a_checkpoint_without_all_its_parts_is_none(store: CheckpointStore) -> None:
    save(store, step=10)
    place = store.place(20, "b")
    with place.written("policy_0.safetensors", 0) as path:
        path.write_bytes(b"one of two")
    assert not place.is_whole(2)
    assert [each.step for each in store.manifests()] == [10]
    assert store.remove_incomplete() == 1
    assert store.remove_incomplete() == 0
    assert [each.step for each in store.manifests()] == [10]


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, best in ((10, 10), (20, 10), (30, 10), (40, 10), (50, 50)):
        save(store, step, best=best)
    assert [each.step for each in store.manifests()] == [40, 50]


def test_of_one_step_the_last_written_is_kept() -> None:
    manifests = [Manifest(name, (), {"step": step}) for name, step in (("a", 1), ("b", 2), ("c", 2), ("d", 3))]
    assert [each.folder for each in replaced(manifests, num_kept=2, best_step=1)] == ["b"]
    assert [each.folder for each in replaced(manifests, num_kept=1, best_step=None)] == ["a", "b", "c"]


def test_a_part_that_is_changed_shortened_or_gone_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, step=10)
    (manifest,) = store.manifests()
    file = Path(manifest.folder) / "policy_1.safetensors"
    whole = file.read_bytes()
    for content, complaint in ((b"x" + whole[1:], "other contents"), (whole[:-1], "6999 bytes, not 7000")):
        file.write_bytes(content)
        assert complaint in str(store.damage(manifest))
        assert store.damage(manifest, ["policy_0.safetensors"]) is None
    file.unlink()
    assert "cannot be read" in str(store.damage(manifest))


@pytest.mark.parametrize("text", ["", '{"format": "x"', '{"format": "other", "version": 1}', "[]"])
def test_a_manifest_from_elsewhere_is_said_and_left_out(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, step=10)
    save(store, step=20)
    (tmp_path / "step_00000020_a" / "manifest.json").write_text(text, encoding="utf-8")
    assert [each.step for each in store.manifests()] == [10]
    assert "step_00000020_a is left out: its manifest cannot be read" in capsys.readouterr().out


def test_a_part_that_cannot_be_written_costs_only_this_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Part):
        def save(self, path: Path) -> None:
            path.write_bytes(self.content[:10])
            raise OSError(28, "No space left on device")

    store = CheckpointStore(str(tmp_path))
    save(store, step=10)
    writers = [CheckpointWriter(store, rank, 2, "a", num_kept=2) for rank in range(2)]
    for writer, part in zip(writers, (Part(b"fine"), Full(b"never whole")), strict=True):
        writer.write(part, {"step": 20}, None)
    settled = threading.Thread(target=writers[1].settle, args=(lambda _: False,))
    settled.start()
    writers[0].settle(lambda _: False)
    settled.join()
    assert [each.step for each in store.manifests()] == [10]
    assert "worker 1: no checkpoint of step 20" in (printed := capsys.readouterr().out)
    assert "No space left on device; training goes on" in printed
    assert not (tmp_path / "step_00000020_a" / "policy_1.safetensors").exists()
    save(store, step=30)
    assert [each.step for each in store.manifests()] == [10, 30]


def test_a_place_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(CheckpointError, match="nowhere://x cannot be opened"):
        CheckpointStore("nowhere://x")
