"""Write a run's record to disk as it comes: numbers, pictures, tags, files. delivery.py brings it to MLflow.

    spool = Spool(run_folder)
    spool.start("srpo", "tiny_srpo", tags={})
    spool.log_metrics("train", {"reward": 0.4, "loss": 0.3}, step=1)
    spool.finish("FINISHED")

A call costs the time of an fsync and never raises OSError: on a full disk the records wait in memory. What a resumed
training repeats is taken once. Opening reads an existing spool; several processes may write to it, one after another.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import PIL.Image

from services.clients.spool_file import ATTACHMENTS, FILE, SpoolFile, read_records
from services.clients.spool_index import RUN_TAG, SpoolIndex, step_of

_MAX_HELD, _MAX_HELD_BYTES = 10_000, 64 * 2**20  # records, and bytes of their pictures and files
_FAST = 1  # of PNG's nine levels: a third of the default's time for a tenth more bytes


class Spool:
    """The record of a run in `folder`. `limit_mib` (tracking.spool_mib) bounds its size on disk in MiB.

    At the limit pictures are left out, at a tenth more numbers, tags and files as well. What MLflow has got counts no
    longer, except for the lines of the file.
    """

    def __init__(self, folder: Path, limit_mib: int = 1024) -> None:
        self._attachments = folder / ATTACHMENTS
        self._attachments.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._limit_mib = limit_mib
        self._attached_bytes = 0  # at most: delivery deletes meanwhile
        self._mutex = threading.Lock()
        self._known = SpoolIndex()
        self._held: deque[_Entry] = deque()
        self._failure: str | None = None
        self._left_out: set[str] = set()
        self._file = SpoolFile(folder / FILE)
        with self._file.locked():
            self._catch_up()
            for each in self._attachments.iterdir():  # its writer was killed before its line
                if each.name not in self._known.attachments:
                    shutil.rmtree(each, ignore_errors=True)

    @property
    def run(self) -> str | None:
        """The run's own id, which `start` has recorded."""
        return self._known.run

    def start(self, experiment: str, name: str, tags: Mapping[str, str]) -> None:
        """Record the run's begin. Its own id is the tag srpo.run, or else drawn."""
        tags = {RUN_TAG: uuid.uuid4().hex, **tags}
        self._append("start", {"experiment": experiment, "name": name, "tags": tags})

    def resume(self) -> None:
        """Record that the run goes on."""
        self._append("status", {"status": "RUNNING"})

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Record the run's end."""
        self._append("status", {"status": status})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings by dotted key. MLflow keeps the first value: another becomes the tag changed.KEY."""
        texts = {key: str(value) for key, value in params.items()}
        before = self._known.params
        if new := {key: text for key, text in texts.items() if key not in before}:
            self._append("params", {"params": new})
        for key in before.keys() & texts.keys():
            if before[key] != texts[key]:
                self.set_tag(f"changed.{key}", texts[key])

    def log_metrics(self, group: str, metrics: Mapping[str, float], step: int) -> None:
        """Record the numbers of a step, once for each group and step."""
        values = {name: float(value) for name, value in metrics.items()}
        self._append("metrics", {"group": group, "step": step, "values": values})

    def log_image(self, image: PIL.Image.Image, key: str, step: int) -> None:
        """Record a picture of a step, once for each key and step."""
        if (key, step) in self._known.images:
            return
        data, time_ms = BytesIO(), _now_ms()
        image.save(data, "PNG", compress_level=_FAST)
        title = re.sub(r"[^\w\-. ]", "~", key)
        name = f"{title}+step+{step}+timestamp+{time_ms}+{uuid.uuid4()}.png"  # MLflow's page reads it
        self._append("image", {"key": key, "step": step, "file": _unique(name)}, data.getvalue(), time_ms)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Record a copy of a file, for `folder` in the run's artifacts."""
        try:
            data = path.read_bytes()
        except OSError as error:
            print(f"warning: the record lacks {path}: {error.strerror}", flush=True)
        else:
            self._append("file", {"file": _unique(path.name), "folder": folder}, data)

    def log_folder(self, path: Path, name: str) -> None:
        """Record that a folder is to be uploaded as `name`. It is not copied: it must stay until it is delivered."""
        self._append("folder", {"path": str(path.absolute()), "name": name})

    def set_tag(self, key: str, value: str) -> None:
        """Record a tag's new value."""
        self._append("tag", {"key": key, "value": value})

    def clear_tag(self, key: str) -> None:
        """Record that a tag is removed."""
        self._append("tag", {"key": key, "value": None})

    def recorded(self, group: str, step: int) -> dict[str, float] | None:
        """Return the numbers that a group has at a step, or None."""
        with self._mutex:
            for entry in self._held:
                if step_of(entry.kind, entry.payload) == (group, step):
                    return dict(entry.payload["values"])
            start = self._known.metrics.get((group, step))
        return None if start is None else dict(read_records(self.folder, start, max_bytes=1)[0].payload["values"])

    def tag(self, key: str) -> str | None:
        """Return a tag's last value, or None if it was never set or is removed."""
        with self._mutex:
            held = {each.payload["key"]: each.payload["value"] for each in self._held if each.kind == "tag"}
            value: str | None = held.get(key, self._known.tags.get(key))
        return value

    def last_step(self, group: str) -> int | None:
        """Return the last step at which a group has numbers, or None."""
        with self._mutex:
            held = [step_of(entry.kind, entry.payload) for entry in self._held]
            steps = [each[1] for each in (*self._known.metrics, *held) if each and each[0] == group]
        return max(steps, default=None)

    def close(self) -> None:
        """Write what waits in memory, and say what is lost if that fails. It may be repeated."""
        with self._mutex:
            if self._file.is_closed:
                return
            self._write_held()
            if self._held:
                print(f"warning: {len(self._held)} records are lost: {self._failure}", flush=True)
            self._file.close()

    def _append(self, kind: str, payload: dict[str, Any], data: bytes = b"", time_ms: int | None = None) -> None:
        with self._mutex:
            self._held.append(_Entry(time_ms or _now_ms(), kind, payload, data))
            self._write_held()

    def _write_held(self) -> None:
        """Write what waits, in order. Numbers go past a picture or file that finds no room."""
        failure, stuck = None, []
        try:
            with self._file.locked():
                self._catch_up()
                while self._held:
                    try:
                        self._write(self._held[0])
                    except OSError as error:
                        if not self._held[0].data:
                            raise
                        failure = error
                        stuck.append(self._held[0])
                    self._held.popleft()
        except OSError as error:
            failure = error
        self._held.extendleft(reversed(stuck))
        self._report(failure)

    def _catch_up(self) -> None:
        for record in self._file.catch_up():
            self._known.note(record.kind, record.payload, record.start)

    def _write(self, entry: _Entry) -> None:
        if self._known.has(entry.kind, entry.payload) or not self._has_room(entry):
            return
        if entry.data:
            self._attach(self._attachments / entry.payload["file"], entry.data)
        record = self._file.append(entry.time_ms, entry.kind, entry.payload)
        self._known.note(record.kind, record.payload, record.start)

    def _attach(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        try:
            with path.open("wb", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
                os.fsync(file.fileno())
        except OSError:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        self._attached_bytes += len(data)

    def _has_room(self, entry: _Entry) -> bool:
        """Return whether the limit allows this; if not, say so once."""
        if entry.kind in ("start", "status"):
            return True
        what, share = ("pictures", 1.0) if entry.kind == "image" else ("numbers, tags and files", 1.1)
        limit = share * self._limit_mib * 2**20
        others = self._file.size + len(json.dumps(entry.payload)) + len(entry.data)
        if others + self._attached_bytes > limit:
            self._attached_bytes = _size_of(self._attachments)
        if others + self._attached_bytes <= limit:
            self._left_out.discard(what)
            return True
        if what not in self._left_out:
            self._left_out.add(what)
            size = f"{(others + self._attached_bytes) / 2**20:.1f} MiB with the next of them"
            key = f"tracking.spool_mib is {self._limit_mib}" + (", and a tenth more" if share > 1 else "")
            print(f"warning: {what} are left out of the record: {self.folder} has {size}, {key}", flush=True)
        return False

    def _report(self, error: OSError | None) -> None:
        """Say once that writing fails, and that it works again. Keep what waits within bounds."""
        before, self._failure = self._failure, None
        if error is not None:
            self._failure = f"cannot write {error.filename or self._file.path}: {error.strerror}"
        if self._failure and not before:
            print(f"warning: {self._failure}; training goes on, and its record waits in memory", flush=True)
        if before and not self._failure:
            print(f"the run's record {self._file.path} can be written again", flush=True)
        while len(self._held) > _MAX_HELD or sum(len(entry.data) for entry in self._held) > _MAX_HELD_BYTES:
            lost = self._held.pop()
            if f"each {lost.kind}" not in self._left_out:
                self._left_out.add(f"each {lost.kind}")
                print(f"warning: the record loses each {lost.kind} from now on: {self._failure}", flush=True)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record that is not written yet; `data` is the content of its attachment."""

    time_ms: int
    kind: str
    payload: dict[str, Any]
    data: bytes


def _unique(name: str) -> str:
    return f"{uuid.uuid4().hex}/{name}"


def _now_ms() -> int:
    return int(time.time() * 1000)


def _size_of(folder: Path) -> int:
    """Return the bytes of all files below, while others may delete some."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += (Path(parent) / name).stat().st_size
            except FileNotFoundError:
                continue
    return size
