"""Every range of a safetensors file reads as safetensors wrote it, from any kind of file; damage is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from trainer.model.tensor_file import BinaryFile, open_tensors

VALUES = {"a": torch.arange(7.0), "b": torch.randn(3, 5), "none": torch.empty(0), "one": torch.tensor(4.0)}


class InMemory:
    """A file that is nowhere on disk."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __str__(self) -> str:
        return "memory:x.safetensors"

    @contextmanager
    def open(self, _mode: Literal["rb"], /) -> Iterator[BinaryFile]:
        with BytesIO(self.content) as file:
            yield file


@given(data=st.data(), name=st.sampled_from(list(VALUES)))
def test_every_range_reads_as_it_was_written(data: st.DataObject, name: str) -> None:
    start = data.draw(st.integers(0, VALUES[name].numel()))
    stop = data.draw(st.integers(start, VALUES[name].numel()))
    with open_tensors(InMemory(save(VALUES, metadata={"key": "value"}))) as file:
        assert file.metadata == {"key": "value"}
        torch.testing.assert_close(
            file.read(name, range(start, stop)), VALUES[name].reshape(-1)[start:stop], rtol=0, atol=0
        )


def test_a_file_on_disk_is_closed_at_the_end(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "x.safetensors")
    with open_tensors(tmp_path / "x.safetensors") as file:
        assert file.metadata == {}
    with pytest.raises(ValueError, match="closed file"):
        file.read("a", range(1))


@pytest.mark.parametrize("kept", [0, 7, 8, 30, -1])
def test_a_file_that_was_cut_short_is_named(kept: int) -> None:
    with (
        pytest.raises(ValueError, match=r"memory:x\.safetensors is damaged: "),
        open_tensors(InMemory(save(VALUES)[:kept])),
    ):
        pass


def with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (save({"a": torch.ones(2, dtype=torch.float16)}), r"a is .*F16"),
        (save(VALUES) + b"more", r"bytes, not "),
        ((2**62).to_bytes(8, "little") + bytes(99), r"its header would have 4611686018427387904 bytes, it has 107"),
        (with_header(["a"]), "pop"),
        (with_header({"a": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
        (with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "a is .*-8"),
        (with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "a is .*4]"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named_with_the_cause(content: bytes, cause: str) -> None:
    with (
        pytest.raises(ValueError, match=rf"memory:x\.safetensors is damaged: .*{cause}"),
        open_tensors(InMemory(content)),
    ):
        pass
