"""Bring a spool's records to MLflow in a thread of its own: in order, each once, whenever MLflow answers.

    delivery = Delivery(run_folder, "http://127.0.0.1:5000")
    delivery.url, delivery.tags()      # once the run is in MLflow
    left = delivery.close(timeout_s=60)

What has arrived is noted in a file (delivered.py) after each call. A call that failed in the middle, and one whose note
a killed process did not make, is in doubt: MLflow is asked before it is repeated (sending.py). Uploads of folders, and
of files that MLflow's store does not take at the moment, are put off until nothing else waits.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from services.clients.delivered import Delivered
from services.clients.sending import MAX_POINTS, Refusals, find_or_start, send, send_folder, send_points
from services.clients.spool_file import FILE as SPOOL
from services.clients.spool_file import Record, read_records
from services.clients.spool_index import RUN_TAG
from services.clients.tracking import RefusedError, Tracker, TrackingError
from services.clients.tracking_errors import UnansweredError

_LOCK = "delivery.lock"
_POLL_S = 0.5  # how old a record may get before it is sent
_DELAYS_S = (1, 2, 4, 8, 16, 30)  # between attempts
_LAST_DELAY_S = 1.0  # while a caller waits for the end
_CHUNK_BYTES = 4 * 2**20  # of the spool, read at once
_PROGRESS_S = 10.0  # between lines about an upload


class Delivery:
    """Delivers the spool in `folder` to the MLflow at `uri`. Of several for one spool, one delivers at a time."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.trouble: str | None = None  # why nothing arrives at the moment
        self._num_before_trouble = 0
        self._state = Delivered.load(folder) or Delivered(uri)
        self._doubt_end = 0  # records that start before this byte may have arrived
        self._tracker: Tracker | None = None
        self._is_ours = False
        self._waiting: deque[Record] = deque()  # read from the spool, not delivered
        self._closing, self._stopped = threading.Event(), threading.Event()
        self._lock = (folder / _LOCK).open("a")
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)  # it may hang in a call
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id in MLflow; None until it is there."""
        return self._state.run_id

    @property
    def url(self) -> str | None:
        """The address of the run's page in MLflow; None until it is there."""
        return self._state.url

    @property
    def num_left(self) -> int:
        """The number of records that have not been delivered."""
        if not self._is_ours:
            self._state = Delivered.load(self.folder) or self._state
        return self._state.num_left(self.folder)

    @property
    def is_over(self) -> bool:
        """Whether the delivery has ended: after `drain` or `close`, or by a mistake of ours."""
        return not self._thread.is_alive()

    @property
    def refused(self) -> dict[str, list[str | int]]:
        """What MLflow has refused for good: how often, and why."""
        return self._state.refused

    def tags(self) -> dict[str, str]:
        """Return the MLflow run's tags. Raise TrackingError while it is not there or does not answer."""
        if self.run_id is None:
            raise TrackingError(f"MLflow at {self.uri}: the run is not there yet")
        return Tracker.open(self.uri, self.run_id).tags()

    def drain(self, timeout_s: float) -> int:
        """Deliver what is left within the time, and nothing that is recorded later. Return the number left.

        It may be called again, to wait longer.
        """
        self._closing.set()
        self._thread.join(timeout_s)
        return self.num_left

    def close(self, timeout_s: float) -> int:
        """Deliver what is left within the time, then stop. Return the number of records left; name what was refused."""
        left = self.drain(timeout_s)
        self._stopped.set()
        for what, (count, reason) in self.refused.items():
            print(f"warning: MLflow has refused {what}, {count} in all: {reason}", flush=True)
        return left

    def _run(self) -> None:
        with self._lock as lock:
            if not self._wait_for(lock):
                return
            self._begin()
            num_failures = 0
            while not self._stopped.is_set():
                is_last = self._closing.is_set()  # before the look: what was recorded until then is delivered
                try:
                    is_idle = not self._deliver_next()
                except (TrackingError, OSError) as error:
                    self._report_trouble(error)
                    self._pause(_DELAYS_S[min(num_failures, len(_DELAYS_S) - 1)])
                    num_failures += 1
                    continue
                num_failures = 0
                if is_idle:
                    self._report_recovery()
                    if is_last:
                        return
                    self._closing.wait(_POLL_S)

    def _wait_for(self, lock: TextIO) -> bool:
        """Wait until no other process delivers this spool. Return False if that is no longer wanted."""
        while not self._stopped.is_set():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self.trouble is None:
                    self.trouble = f"another process delivers the record in {self.folder}"
                    print(f"{self.trouble}: waiting for it", flush=True)
                self._pause(_POLL_S)
                continue
            except OSError as error:
                print(f"warning: {self.folder} is on a file system without locks ({error}): deliver once", flush=True)
            return True
        return False

    def _begin(self) -> None:
        noted = Delivered.load(self.folder)
        self._state = noted or Delivered(self.uri)
        spool = self.folder / SPOOL
        self._doubt_end = noted.end + 1 if noted else spool.stat().st_size if spool.exists() else 0
        self.trouble, self._is_ours = None, True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._stopped.wait(min(seconds, _LAST_DELAY_S))
        else:
            self._closing.wait(seconds)

    def _report_trouble(self, error: Exception) -> None:
        self._doubt_end = max(self._doubt_end, self._state.end + 1)
        if self.trouble is None:
            kept = f"the record is kept in {self.folder} and delivered when"
            if isinstance(error, UnansweredError):
                print(f"warning: MLflow at {self.uri} does not answer: {kept} it does", flush=True)
            else:
                print(f"warning: {error}: {kept} that is mended", flush=True)
            self._num_before_trouble = self._state.sequence
        self.trouble = str(error)

    def _report_recovery(self) -> None:
        if self.trouble is not None:
            num_delivered = self._state.sequence - self._num_before_trouble
            print(f"MLflow at {self.uri} answers again: delivered {num_delivered} records that waited", flush=True)
        self.trouble = None

    def _deliver_next(self) -> bool:
        """Deliver what is next. Return whether there was anything. Raise TrackingError, or OSError of the note."""
        if self._state.uri != self.uri:
            self._move()
        if records := self._next_records():
            self._note(self._deliver(records))
            for _ in records:
                self._waiting.popleft()
        elif self._state.later:
            self._deliver_later()
        else:
            return False
        return True

    def _next_records(self) -> list[Record]:
        """Return the next record, or the next metrics records that fit into one call."""
        if not self._waiting:
            self._waiting.extend(read_records(self.folder, self._state.end, _CHUNK_BYTES))
        records: list[Record] = []
        num_points = 0
        for record in self._waiting:
            num_points += len(record.payload.get("values", ()))
            if records and not (records[0].kind == record.kind == "metrics" and num_points <= MAX_POINTS):
                break
            records.append(record)
        return records

    def _deliver(self, records: list[Record]) -> Delivered:
        """Deliver one record or several of metrics, and return the note of it."""
        first, last = records[0], records[-1]
        in_doubt = first.start < self._doubt_end
        state = replace(self._state, sequence=last.sequence, end=last.end)
        if first.kind == "start":
            self._tracker = find_or_start(self.uri, first, in_doubt)
            return replace(state, run_id=self._tracker.run_id, url=self._tracker.url)
        if first.kind == "metrics":
            return _with_refused(state, send_points(self._there(), records, in_doubt))
        if first.kind == "folder":
            return self._put_off(state, first)
        try:
            return _with_refused(state, send(self._there(), self.folder, first, in_doubt))
        except TrackingError:
            if first.kind not in ("image", "file"):
                raise
            self._there().tags()  # raises if it is MLflow that does not answer, and not only its store of files
            name = Path(first.payload["file"]).name
            print(f"warning: MLflow's store takes no files at the moment: {name} waits for later", flush=True)
            return self._put_off(state, first)

    def _there(self) -> Tracker:
        if self._tracker is None:
            if self._state.run_id is None:
                raise TrackingError(f"the record in {self.folder} has no start")
            self._tracker = Tracker.open(self.uri, self._state.run_id)
        return self._tracker

    def _put_off(self, state: Delivered, record: Record) -> Delivered:
        """Note an upload for later, in place of an earlier one of the same folder."""
        later = {
            start: num_sent
            for start, num_sent in state.later.items()
            if record.kind != "folder" or self._record_at(start).payload != record.payload
        }
        return replace(state, later=later | {str(record.start): 0})

    def _deliver_later(self) -> None:
        """Upload one of those that were put off, files before folders."""
        waiting = [self._record_at(start) for start in self._state.later]
        record = min(waiting, key=lambda each: (each.kind == "folder", each.start))
        if record.kind == "folder":
            refused = self._upload(record)
        else:
            refused = send(self._there(), self.folder, record, in_doubt=True)
        if not self._stopped.is_set():
            later = {start: num_sent for start, num_sent in self._state.later.items() if start != str(record.start)}
            self._note(_with_refused(replace(self._state, later=later), refused))

    def _upload(self, record: Record) -> Refusals:
        """Upload a folder file by file, and print how far it is; go on where an earlier attempt ended."""
        name, key, printed = f"{record.payload['name']}/", str(record.start), float("-inf")
        if not Path(record.payload["path"]).is_dir():
            return [(f"folder {name}", f"{record.payload['path']} is missing")]
        try:
            for number, path, size in send_folder(self._there(), record, self._state.later[key]):
                self._note(replace(self._state, later={**self._state.later, key: number}))
                if self._stopped.is_set():
                    return []
                if time.monotonic() - printed > _PROGRESS_S:
                    printed = time.monotonic()
                    print(f"uploading {name} to MLflow: file {number + 1}, {path} ({size / 2**20:.1f} MiB)", flush=True)
        except RefusedError as error:
            self._there().require_active()
            return [(f"folder {name}", str(error))]
        print(f"uploaded {name} to MLflow", flush=True)
        return []

    def _move(self) -> None:
        """Find the run at another address. If that is another MLflow, deliver the whole record there."""
        state = replace(self._state, uri=self.uri)
        if state.run_id is not None:
            (start,) = read_records(self.folder, 0, max_bytes=1)
            found = Tracker.tagged(self.uri, RUN_TAG, start.payload["tags"][RUN_TAG])
            if same := [each for each in found if each.run_id == state.run_id]:
                state = replace(state, url=same[0].url)
            else:
                print(f"MLflow at {self.uri} does not have this run: its whole record goes there", flush=True)
                state = Delivered(self.uri)
        self._note(state)

    def _record_at(self, start: str) -> Record:
        return read_records(self.folder, int(start), max_bytes=1)[0]

    def _note(self, state: Delivered) -> None:
        """Make it the state, if the note of it is safe on disk. Raise OSError if not."""
        state.save(self.folder)
        for what in state.refused.keys() - self._state.refused.keys():
            print(f"warning: MLflow refuses {what} for good: {state.refused[what][1]}", flush=True)
        self._state = state


def _with_refused(state: Delivered, refusals: Refusals) -> Delivered:
    refused = dict(state.refused)
    for what, reason in refusals:
        count, first_reason = refused.get(what, [0, reason])
        refused[what] = [int(count) + 1, first_reason]
    return replace(state, refused=refused)
