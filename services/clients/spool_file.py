"""Keep records as lines of a file: each is there whole or not at all, whoever is killed and whatever is full.

Several processes may write, and one of them may be killed at any byte. A line counts once it ends. One that does not is
dropped by the next process that writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

FILE = "spool.jsonl"
ATTACHMENTS = "attachments"


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the file, and the bytes at which it starts and ends.

    >>> Record(1, 1700000000000, "tag", {"key": "warning", "value": "…"}, start=0, end=78).kind
    'tag'
    """

    sequence: int  # 1, 2, 3 …
    time_ms: int  # since 1970, when it was recorded
    kind: str
    payload: dict[str, Any]
    start: int
    end: int


class SpoolFile:
    """The file, open for writing. OSError from any method leaves all that was there before as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes that are read or written by us
        self._last_sequence = 0
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        sync_folder(path.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Return a context in which no other process reads or writes the file."""
        with _locked(self._file, fcntl.LOCK_EX):
            yield

    def catch_up(self) -> Iterator[Record]:
        """Yield what others have written, and drop what was written in part. The file must be locked."""
        if os.fstat(self._file.fileno()).st_size == self.size:
            return
        with self.path.open("rb") as file:
            for record in _records_from(file, self.size):
                self.size, self._last_sequence = record.end, record.sequence
                yield record
        self._file.truncate(self.size)

    def append(self, time_ms: int, kind: str, payload: dict[str, Any]) -> Record:
        """Write a line down to the disk. The file must be locked and caught up with."""
        sequence = self._last_sequence + 1
        line = json.dumps([sequence, time_ms, kind, payload]).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], self.size + written)
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self.size)
            raise
        record = Record(sequence, time_ms, kind, payload, self.size, self.size + len(line))
        self.size, self._last_sequence = record.end, sequence
        return record

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()


def read_records(folder: Path, start: int = 0, max_bytes: int | None = None) -> list[Record]:
    """Return the records from a byte on, none if there is no file. Others may write to it meanwhile.

    With `max_bytes` the last one is that in which they end.
    """
    records: list[Record] = []
    with suppress(FileNotFoundError), (folder / FILE).open("rb") as file, _locked(file, fcntl.LOCK_SH):
        for record in _records_from(file, start):
            records.append(record)
            if max_bytes is not None and record.end - start >= max_bytes:
                break
    return records


def sync_folder(folder: Path) -> None:
    """Write down to the disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records_from(file: BinaryIO, start: int) -> Iterator[Record]:
    file.seek(start)
    for line in file:
        if not line.endswith(b"\n"):
            return
        end = start + len(line)
        try:
            sequence, time_ms, kind, payload = json.loads(line)
        except (ValueError, TypeError):  # no line of ours: a file system that lost power can leave zeros
            print(f"warning: {file.name} is damaged between bytes {start} and {end}; the rest is used", flush=True)
        else:
            yield Record(sequence, time_ms, kind, payload, start, end)
        start = end


@contextmanager
def _locked(file: BinaryIO | FileIO, mode: int) -> Iterator[None]:
    with suppress(OSError):  # a file system without locks: then only one process may write
        fcntl.flock(file, mode)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
