"""Chunks are made once, stay whole, and belong to what they depend on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.evaluation.kept_chunks import KeptChunks, identity


class Maker:
    """Makes a chunk, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, Tensor]:
        self.count += 1
        return {"images": torch.arange(12, dtype=torch.uint8).reshape(4, 3)}


def test_a_chunk_is_made_once_and_its_rows_can_be_read(tmp_path: Path) -> None:
    kept, make = KeptChunks.of(tmp_path, {"seed": 0}), Maker()
    assert not kept.has(2)
    first = kept.get(2, make)["images"]
    assert KeptChunks.of(tmp_path, {"seed": 0}).get(2, make)["images"].equal(first)
    assert make.count == 1
    assert kept.rows(2, "images", [3, 1]).equal(first[[3, 1]])
    assert not [file for file in kept.folder.iterdir() if file.suffix == ".partial"]


def test_a_damaged_chunk_is_made_again_and_named_where_it_is_only_read(tmp_path: Path) -> None:
    kept, make = KeptChunks.of(tmp_path, {}), Maker()
    kept.get(0, make)
    file = kept.folder / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(OSError, match=r"00000\.safetensors is absent or damaged"):
        kept.get(0)
    assert kept.get(0, make)["images"].shape == (4, 3)
    assert make.count == 2
    assert kept.get(0)["images"].shape == (4, 3)


def test_another_source_has_other_chunks(tmp_path: Path) -> None:
    KeptChunks.of(tmp_path, {"seed": 0}).get(0, Maker())
    assert not KeptChunks.of(tmp_path, {"seed": 1}).has(0)


def test_a_folder_is_another_when_a_file_is_written_again_added_or_lies_elsewhere(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        (folder / "transformer").mkdir(parents=True)
        (folder / "transformer" / "weights").write_bytes(b"1234")
        os.utime(folder / "transformer" / "weights", ns=(1, 1))
    before = identity(model)
    assert identity(model) == before != identity(other)
    os.utime(model / "transformer" / "weights", ns=(1, 2))
    written = identity(model)
    (model / "added").write_bytes(b"")
    assert len({each["files"] for each in (before, written, identity(model))}) == 3
