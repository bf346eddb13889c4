"""Send records to an MLflow run so that each arrives once, also where one may have arrived before.

MLflow's SQL stores drop a number that they have with the same step and time; its file store doubles it. So what is in
doubt is looked up first. A tag, a status, parameters and files can be sent again without harm.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from services.clients.spool_file import ATTACHMENTS, Record
from services.clients.spool_index import RUN_TAG
from services.clients.tracking import Point, RefusedError, Tracker, check_metric_name

MAX_POINTS = 1000  # in a call, MLflow's limit
Item = TypeVar("Item")
Refusals = list[tuple[str, str]]  # what MLflow does not take, and why


def find_or_start(uri: str, record: Record, in_doubt: bool) -> Tracker:
    """Return the MLflow run of a spool, by the record of its start. Raise TrackingError."""
    experiment, name, tags = (record.payload[key] for key in ("experiment", "name", "tags"))
    found = Tracker.tagged(uri, RUN_TAG, tags[RUN_TAG]) if in_doubt else []
    return found[0] if found else Tracker.start(uri, experiment, name, tags, record.time_ms)


def send_points(tracker: Tracker, records: Sequence[Record], in_doubt: bool) -> Refusals:
    """Send the numbers of metrics records, in calls of up to 1,000. Return those refused; raise TrackingError."""
    points, refused = [], []
    for record in records:
        for name, value in record.payload["values"].items():
            try:
                check_metric_name(name)
            except ValueError as error:
                refused.append((f"metric {name!r}", str(error)))
            else:
                points.append((name, value, record.time_ms, record.payload["step"]))
    if in_doubt:
        arrived = {name: {each[2:] for each in tracker.points(name)} for name in {each[0] for each in points}}
        points = [point for point in points if point[2:] not in arrived[point[0]]]
    for start in range(0, len(points), MAX_POINTS):
        refused += _split_refused(tracker, points[start : start + MAX_POINTS], tracker.log_points, _name_of_point)
    return refused


def send(tracker: Tracker, folder: Path, record: Record, in_doubt: bool) -> Refusals:
    """Send any other record but a start and a folder. Return what is refused; raise TrackingError."""
    payload = record.payload
    if record.kind == "params":
        return _split_refused(
            tracker, list(payload["params"].items()), lambda some: tracker.log_params(dict(some)), _name_of_param
        )
    if record.kind in ("image", "file"):
        return _send_file(tracker, folder / ATTACHMENTS / payload["file"], record, in_doubt)
    if record.kind == "status":
        what, call = f"status {payload['status']}", partial(_send_status, tracker, record)
    elif payload["value"] is None:
        what, call = f"tag {payload['key']!r}", partial(tracker.clear_tag, payload["key"])
    else:
        what, call = f"tag {payload['key']!r}", partial(tracker.set_tag, payload["key"], payload["value"])
    return _refusals(tracker, what, call)


def send_folder(tracker: Tracker, record: Record, num_sent: int) -> Iterator[tuple[int, Path, int]]:
    """Upload a folder's files but for the first `num_sent`. Yield before each: its number, path and bytes."""
    root = Path(record.payload["path"])
    for number, path in list(enumerate(sorted(each for each in root.rglob("*") if each.is_file())))[num_sent:]:
        yield number, path, path.stat().st_size
        parent = path.parent.relative_to(root)
        tracker.log_file(path, (record.payload["name"] / parent).as_posix())


def _send_status(tracker: Tracker, record: Record) -> None:
    if record.payload["status"] == "RUNNING":
        Tracker.resume(tracker.uri, tracker.run_id)
        return
    tracker.finish(record.payload["status"], record.time_ms)
    for twin in Tracker.tagged(tracker.uri, RUN_TAG, tracker.tags().get(RUN_TAG, tracker.run_id)):
        if twin.run_id != tracker.run_id:  # a request to open the run that seemed lost arrived after all
            twin.discard_empty()


def _send_file(tracker: Tracker, path: Path, record: Record, in_doubt: bool) -> Refusals:
    """Upload an attachment, and delete it."""
    images = record.kind == "image"
    if not path.is_file():
        has_arrived = in_doubt and tracker.has_file(path.name, "images" if images else record.payload["folder"])
        return [] if has_arrived else [(f"{record.kind} {path.name}", f"its file {path} is missing")]
    if images:
        refused = _refusals(tracker, f"image {path.name}", partial(tracker.log_image_file, path))
    else:
        refused = _refusals(tracker, f"file {path.name}", partial(tracker.log_file, path, record.payload["folder"]))
    shutil.rmtree(path.parent, ignore_errors=True)
    return refused


def _split_refused(
    tracker: Tracker, items: list[Item], log: Callable[[list[Item]], None], name: Callable[[Item], str]
) -> Refusals:
    """Log the items in one call; if that is refused, each half, so that only those are left out that MLflow refuses."""
    if len(items) < 2:
        return [refused for item in items for refused in _refusals(tracker, name(item), partial(log, items))]
    try:
        log(items)
    except RefusedError:
        middle = len(items) // 2
        halves = items[:middle], items[middle:]
        return [refused for half in halves for refused in _split_refused(tracker, half, log, name)]
    return []


def _refusals(tracker: Tracker, what: str, call: Callable[[], None]) -> Refusals:
    """Make a call. Return `what` with the reason if MLflow refuses it for good; raise TrackingError.

    Of a deleted run it refuses everything, until somebody restores it. So the run is looked at before and after.
    """
    try:
        call()
    except RefusedError:
        tracker.require_active()
    else:
        return []
    try:
        call()
    except RefusedError as error:
        tracker.require_active()
        return [(what, str(error))]
    return []


def _name_of_point(point: Point) -> str:
    return f"metric {point[0]!r}"


def _name_of_param(pair: tuple[str, str]) -> str:
    return f"parameter {pair[0]!r}"
