"""Keep the checkpoints of a run in a folder, or at any URI that pyarrow knows: each is complete or absent.

    store = CheckpointStore("s3://bucket/checkpoints/tiny_srpo/20261128-051200-3f9a")
    place = store.place(step=10, attempt="a1b2c3")
    place.put(file)                              # each worker its own
    place.complete({"step": 10, ...}, num_workers=2)     # one worker, once all have
    store.manifests()[-1].files

A checkpoint is a folder of files, which no other attempt writes to. Its manifest comes last and lists them with size
and SHA-256; without one the folder counts for nothing. In a local folder files are written in place, elsewhere they
are uploaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow
from pyarrow import fs

from services.clients.run_folder import RunFolder
from services.config.run import RunConfig

_FORMAT, _VERSION = "srpo-ray checkpoint", 1
_MANIFEST, _PART = "manifest.json", ".part.json"
_COPY_BYTES = 16 * 2**20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text names its place and the cause."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint.

    >>> StoredFile(name="policy_0.safetensors", size=112_000_000, sha256="9f86d0…")
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredPath:
    """The path of a file in a storage that is not local. Opening and reading it raises CheckpointError."""

    _files: Any
    _path: str

    def __str__(self) -> str:
        return self._path

    @contextmanager
    def open(self, _mode: Literal["rb"], /) -> Iterator[Any]:
        """Let the file be read from any byte on within the context."""
        with _named(self._path, "read"), self._files.open_input_file(self._path) as file:
            yield file


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete checkpoint: where it lies, and what its writer said about it (`facts`, with the step among them)."""

    folder: str
    files: tuple[StoredFile, ...]
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.facts["step"])


class CheckpointStore:
    """The checkpoints of one run at `location`: a folder or a URI. Every method raises CheckpointError."""

    def __init__(self, location: str) -> None:
        self.location = location
        with _named(location, "opened"):
            if "://" in location:
                self._files, self._root = fs.FileSystem.from_uri(location)
            else:
                self._files, self._root = fs.LocalFileSystem(), str(Path(location).resolve())
        self.is_local = isinstance(self._files, fs.LocalFileSystem)

    def place(self, step: int, attempt: str) -> Place:
        """Return where one attempt's workers put the files of this step."""
        return Place(self, f"{self._root}/step_{step:08d}_{attempt}")

    def manifests(self) -> list[Manifest]:
        """Return the complete checkpoints by step, those of one step by time. Prints a line for an unreadable one."""
        with _named(self.location, "listed"):
            folders = self._folders()
        found = [manifest for folder in folders if (manifest := self.manifest(folder)) is not None]
        return sorted(found, key=lambda each: (each.step, each.facts.get("time", 0)))

    def files(self, manifest: Manifest) -> list[StoredPath | Path]:
        """Return where a checkpoint's files are; what is read of them is all that is moved."""
        if self.is_local:
            return [Path(manifest.folder) / file.name for file in manifest.files]
        return [StoredPath(self._files, f"{manifest.folder}/{file.name}") for file in manifest.files]

    def damage(self, manifest: Manifest, names: Sequence[str] | None = None) -> str | None:
        """Read a checkpoint's files, or those of some names, and return what is wrong with the first bad one."""
        for file in manifest.files:
            if names is not None and file.name not in names:
                continue
            try:
                with self._files.open_input_stream(f"{manifest.folder}/{file.name}") as source:
                    size, sha256 = _sum(source)
            except (OSError, pyarrow.ArrowException) as error:
                return f"{file.name} cannot be read: {error}"
            if size != file.size:
                return f"{file.name} has {size} bytes, not {file.size}"
            if sha256 != file.sha256:
                return f"{file.name} has other contents than were written"
        return None

    def remove(self, manifest: Manifest) -> None:
        """Remove a checkpoint: its manifest first, so that it is never half there."""
        with _named(manifest.folder, "removed"):
            self._files.delete_file(f"{manifest.folder}/{_MANIFEST}")
            self._files.delete_dir(manifest.folder)

    def remove_incomplete(self) -> int:
        """Remove what was never completed, once nobody writes any more. Return the number of folders."""
        with _named(self.location, "cleared"):
            torn = [folder for folder in self._folders() if not self._exists(f"{folder}/{_MANIFEST}")]
            for folder in torn:
                self._files.delete_dir(folder)
        return len(torn)

    def _folders(self) -> list[str]:
        entries = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return [each.path for each in entries if each.type == fs.FileType.Directory and "/step_" in each.path]

    def manifest(self, folder: str) -> Manifest | None:
        """Return the manifest in a folder; None if it has none, or, with a printed line, if it cannot be read."""
        try:
            if not self._exists(f"{folder}/{_MANIFEST}"):
                return None
            with self._files.open_input_stream(f"{folder}/{_MANIFEST}") as stream:
                tree = json.loads(stream.read())
            if (tree["format"], tree["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"its format is {tree['format']!r} {tree['version']!r}, not {_FORMAT!r} {_VERSION}")
            return Manifest(folder, tuple(StoredFile(**each) for each in tree["files"]), tree["facts"])
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
            print(f"checkpoint {folder} is left out: its manifest cannot be read: {error}", flush=True)
            return None

    def _exists(self, path: str) -> bool:
        return bool(self._files.get_file_info(path).type == fs.FileType.File)


class Place:
    """A checkpoint in the making. Its methods raise CheckpointError."""

    def __init__(self, store: CheckpointStore, folder: str) -> None:
        self.folder = folder
        self._store, self._files = store, store._files

    @contextmanager
    def written(self, name: str, rank: int) -> Iterator[Path]:
        """Let the caller write one file within the context; then put it in place with its sums, as worker `rank`'s.

        A file that cannot be written whole is removed.
        """
        with _named(self.folder, "written"):
            if self._store.is_local:
                path = Path(self.folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with _removed_on_error(path):
                    yield path
                    self._put_sums(path, name, rank)
                return
            with TemporaryDirectory() as folder:
                path = Path(folder) / name
                yield path
                self._upload(path, f"{self.folder}/{name}")
                self._put_sums(path, name, rank)

    def is_whole(self, num_workers: int) -> bool:
        """Return whether each worker has put its file."""
        with _named(self.folder, "looked at"):
            return all(self._store._exists(self._part(rank)) for rank in range(num_workers))

    def complete(self, facts: Mapping[str, Any], num_workers: int) -> Manifest:
        """Write the manifest, and so make the checkpoint one. `facts` holds the step at least."""
        with _named(self.folder, "completed"):
            files = []
            for rank in range(num_workers):
                with self._files.open_input_stream(self._part(rank)) as stream:
                    files.append(StoredFile(**json.loads(stream.read())))
            tree = {"format": _FORMAT, "version": _VERSION, "files": [asdict(each) for each in files], "facts": facts}
            self._write(f"{self.folder}/{_MANIFEST}", json.dumps(tree, indent=1).encode())
        return Manifest(self.folder, tuple(files), facts)

    def abandon(self) -> None:
        """Remove what was written of it, as far as that is possible."""
        if self._store.is_local:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _put_sums(self, path: Path, name: str, rank: int) -> None:
        with path.open("rb") as source:
            os.fsync(source.fileno())
            size, sha256 = _sum(source)
        self._write(self._part(rank), json.dumps(asdict(StoredFile(name, size, sha256))).encode())

    def _part(self, rank: int) -> str:
        return f"{self.folder}/{rank}{_PART}"

    def _write(self, path: str, content: bytes) -> None:
        """Write a small file that is whole or absent: an object store shows none before it is closed."""
        if not self._store.is_local:
            with self._files.open_output_stream(path) as stream:
                stream.write(content)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        draft = Path(f"{path}.draft")
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)

    def _upload(self, source: Path, path: str) -> None:
        with source.open("rb") as stream, self._files.open_output_stream(path) as target:
            shutil.copyfileobj(stream, target, _COPY_BYTES)


def files_of(folder: Path) -> list[Path]:
    """Return the files of the checkpoint in a local folder; none if there is no whole one."""
    manifest = CheckpointStore(str(folder.parent)).manifest(str(folder.resolve()))
    return [folder / file.name for file in manifest.files] if manifest is not None else []


def checkpoint_location(config: RunConfig, run: RunFolder) -> str:
    """Return the folder or URI of a run's checkpoints."""
    if config.checkpoint.storage is None:
        return str(run.path / "checkpoints")
    storage, question_mark, options = config.checkpoint.storage.partition("?")  # s3://bucket/folder?region=…
    return f"{storage.rstrip('/')}/{config.name}/{run.id}{question_mark}{options}"


@contextmanager
def _named(place: str, done: str) -> Iterator[None]:
    """Raise any error of the storage within the context as a CheckpointError that names the place."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(f"{place} cannot be {done}: {str(error).splitlines()[0]}") from error


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sum(source: Any) -> tuple[int, str]:
    """Return the size and SHA-256 of a stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_COPY_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()
