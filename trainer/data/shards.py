"""Keep encoded tensors on disk: whole safetensors files with a row an item, and a manifest of what made them.

    folder/manifest.json
    folder/NAME.safetensors        tensors of equal length, and text about their rows as metadata

Prompt embeddings and image latents both lie like this. A file has its name only once it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from services.config.fields import Frozen

MANIFEST, SHARD_SUFFIX = "manifest.json", ".safetensors"
_PARTIAL = ".partial"  # of a file that is being written

ManifestT = TypeVar("ManifestT", bound=Frozen)


@dataclass(frozen=True, slots=True)
class Shards:
    """The encoded tensors in `folder`, which the run file names under `key`.

    Raise `error` for a file that cannot be used; its text names the key, the file and `cure`, the command that writes
    the folder.

    >>> Shards(Path("latents"), "dataset.latents_path", "run `srpo encode-images RUN.yaml`", DatasetError)
    """

    folder: Path
    key: str
    cure: str
    error: type[ValueError]

    def paths(self) -> list[Path]:
        """Return the shards that are there, in a fixed order."""
        return sorted(self.folder.glob(f"*{SHARD_SUFFIX}"))

    def has_manifest(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def read_manifest(self, kind: type[ManifestT]) -> ManifestT:
        path = self.folder / MANIFEST
        try:
            return kind.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise self.error(f"{self.key} {self.folder} has no {MANIFEST}: {self.cure}") from error
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            problem = _first_problem(error) if isinstance(error, ValidationError) else error
            raise self._unreadable(path, error, problem) from error

    def write_manifest(self, manifest: Frozen) -> Path:
        """Write it whole, so that a reader sees the old one or the new one. Return its path."""
        return _write_whole(self.folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        """Write the shard `name` whole or not at all. Return its path."""
        content = {key: each.cpu().contiguous() for key, each in tensors.items()}
        return _write_whole(self.folder / name, save(content, dict(metadata) if metadata else None))

    def read_row(self, path: Path, row: int) -> dict[str, Tensor]:
        """Return one row, (1, …), of each tensor of a shard; the file is mapped, so that a row costs its own bytes."""
        try:
            with _opened(path) as file:
                return {name: file.get_slice(name)[row : row + 1] for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise self._unreadable(path, error) from error

    def read_metadata(self, path: Path, name: str) -> str:
        """Return the text that `write` stored under `name`."""
        try:
            with _opened(path) as file:
                text: str = file.metadata()[name]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise self._unreadable(path, error) from error
        return text

    def remove_partial(self) -> None:
        """Remove what a job that was killed has left half-written."""
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            partial.unlink()

    def _unreadable(self, path: Path, error: Exception, problem: object = None) -> ValueError:
        if isinstance(error, FileNotFoundError):
            cure = f": {self.cure}"
        else:  # the file behind a failing drive may be whole
            cure = "" if isinstance(error, OSError) else f": delete it and {self.cure}"
        return self.error(f"{self.key}: cannot read {path} ({problem or error}){cure}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    path.open("rb").close()  # safetensors calls every file that it cannot open absent
    with safe_open(path, framework="pt") as file:
        yield file


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])) + f": {first['msg']}"


def _write_whole(path: Path, content: bytes) -> Path:
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
