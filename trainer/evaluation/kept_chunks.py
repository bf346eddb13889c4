"""Keep on disk, chunk by chunk, what took long to draw or measure, so that a stopped evaluation goes on from there.

    drawn = KeptChunks.of(folder, {"model": identity(path), "seed": 0})
    images = drawn.get(3, lambda: {"images": draw(chunk)})["images"]  # drawn once, read from then on

Chunks lie in a folder named by the digest of what they depend on. Whoever changes a model or a setting gets another
folder; kept.json in it says what it is for. A chunk is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_NUM_DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True)
class KeptChunks:
    """Numbered chunks of tensors by name, in a folder that workers may share if each chunk is one worker's."""

    folder: Path

    @classmethod
    def of(cls, parent: Path, source: Mapping[str, Any]) -> KeptChunks:
        """Return the chunks that depend on `source`, whatever JSON can hold, in a folder below `parent`; make it."""
        text = json.dumps(source, indent=1, sort_keys=True, ensure_ascii=False)
        kept = cls(parent / hashlib.sha256(text.encode()).hexdigest()[:_NUM_DIGEST_CHARS])
        kept.folder.mkdir(parents=True, exist_ok=True)
        (kept.folder / "kept.json").write_text(text + "\n", encoding="utf-8")
        return kept

    def has(self, chunk: int) -> bool:
        """Return whether the chunk is there."""
        return self._path(chunk).is_file()

    def get(self, chunk: int, make: Callable[[], dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Read a chunk. One that is absent or damaged is made and written first; without `make`, raise OSError."""
        path = self._path(chunk)
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            if make is None:
                raise OSError(f"{path} is absent or damaged: delete it, and run the evaluation again") from error
        tensors = make()
        self._write(path, tensors)
        return tensors

    def rows(self, chunk: int, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of one tensor of a chunk that is there."""
        return read_rows(self._path(chunk), name, rows)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # another evaluation may write the same chunk
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def read_rows(path: Path, name: str, rows: Sequence[int]) -> Tensor:
    """Read some rows of one tensor of a safetensors file, and not the others."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_slice(name)
        return torch.stack([tensor[row] for row in rows])


def identity(path: Path) -> dict[str, Any]:
    """Return what tells one state of a folder or file from another without reading it: path, and of all files names,
    sizes and times of the last change."""
    path = path.resolve()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    listed = [(str(each.relative_to(path)), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    return {"path": str(path), "files": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}
