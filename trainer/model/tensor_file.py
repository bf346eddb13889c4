"""Read ranges of the tensors in a safetensors file, wherever it lies, and nothing else of it.

    with open_tensors(Path("policy_0.safetensors")) as file:
        file.read("weights/proj_out.weight", range(512, 1024))

safetensors itself reads ranges of local files alone. Source of the format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000  # as safetensors limits it
_ITEM_BYTES = torch.float32.itemsize


class BinaryFile(Protocol):
    """A file that is open for reading."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a byte."""

    def read(self, size: int = -1, /) -> bytes:
        """Read bytes from there."""


class FilePlace(Protocol):
    """Where a file is: a Path, or a place in an object store. As text it is what messages call the file."""

    def open(self, mode: Literal["rb"], /) -> AbstractContextManager[BinaryFile]:
        """Open it for reading."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """An open safetensors file of float32 tensors. metadata: what its writer put beside them."""

    metadata: Mapping[str, str]
    _file: BinaryFile
    _starts: Mapping[str, int]

    def read(self, name: str, wanted: range) -> Tensor:
        """Return the numbers `wanted` of a flattened tensor, (len(wanted),) float32. Raise ValueError at the end."""
        if not wanted:
            return torch.empty(0)
        self._file.seek(self._starts[name] + wanted.start * _ITEM_BYTES)
        return torch.frombuffer(bytearray(_read(self._file, len(wanted) * _ITEM_BYTES)), dtype=torch.float32)


@contextmanager
def open_tensors(place: FilePlace) -> Iterator[TensorFile]:
    """Open a safetensors file of float32 tensors. Raise ValueError with its place if it is none, or not whole."""
    with place.open("rb") as file:
        try:
            opened = _opened(file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place} is damaged: {error}") from error
        yield opened


def _opened(file: BinaryFile) -> TensorFile:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(_read(file, _LENGTH_BYTES), "little")
    if length > min(size, _MAX_HEADER_BYTES):
        raise ValueError(f"its header would have {length} bytes, it has {size}")
    tensors = json.loads(_read(file, length))
    metadata = tensors.pop("__metadata__", {})
    begin = _LENGTH_BYTES + length
    starts, end = {}, begin
    for name, tensor in tensors.items():
        start, stop = tensor["data_offsets"]
        if tensor["dtype"] != "F32" or stop - start != prod(tensor["shape"]) * _ITEM_BYTES or start < 0:
            raise ValueError(f"{name} is {tensor}")
        starts[name], end = begin + start, max(end, begin + stop)
    if size != end:
        raise ValueError(f"it has {size} bytes, not {end}")
    return TensorFile(metadata, file, starts)


def _read(file: BinaryFile, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise ValueError(f"it ends after {len(content)} of {size} bytes that were to be read")
    return content
