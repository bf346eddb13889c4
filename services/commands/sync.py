"""`srpo sync`: bring to MLflow what a run has recorded and MLflow did not take meanwhile."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from services.clients.delivered import Delivered
from services.clients.spool_file import FILE, read_records
from services.commands.usage import UsageError
from services.config.run import RunConfig

if TYPE_CHECKING:
    from services.clients.delivery import Delivery

_DEFAULT_OUTPUT_DIR = RunConfig.model_fields["output_dir"].default
_LINE_S = 5.0  # between lines of progress
_FIRST_BYTES = 2**20  # of a spool: its parameters are in there


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo sync`."""
    parser.add_argument("run", metavar="RUN", help=f"a run's folder, which has {FILE}, or the name of a run")
    parser.add_argument(
        "--output-dir", type=Path, default=_DEFAULT_OUTPUT_DIR, metavar="DIR", help="of a run by name (%(default)s)"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="of MLflow, if not that of the run")
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, metavar="S", help="how long MLflow may take nothing (%(default)g)"
    )
    parser.epilog = "The exit code is 1 if something is left or refused. It may be started again at any time."
    parser.set_defaults(handler=_sync)


def _sync(args: argparse.Namespace) -> int:
    """Deliver and print how far it is. Raise UsageError if there is nothing to deliver, or nowhere."""
    folder = _folder(args.run, args.output_dir)
    uri = args.tracking_uri or _tracking_uri(folder)
    left = (Delivered.load(folder) or Delivered(uri)).num_left(folder)
    print(f"{left} records in {folder} wait for MLflow at {uri}", flush=True)
    from services.clients.delivery import Delivery  # here, because MLflow takes seconds to import

    try:
        delivery = Delivery(folder, uri)
    except OSError as error:
        raise UsageError(f"{folder} must be writable, for notes of what has arrived: {error.strerror}") from error
    _follow(delivery, left, args.timeout_s)
    left = delivery.close(timeout_s=0)
    if left:
        print(f"{left} records are left in {folder}: {delivery.trouble or 'they came meanwhile'}", flush=True)
    else:
        print(f"nothing is left: {delivery.url}", flush=True)
    return 1 if left or delivery.refused else 0


def _follow(delivery: Delivery, total: int, timeout_s: float) -> None:
    """Return when all `total` records are delivered, or when none was for `timeout_s`."""
    left = total
    moved = time.monotonic()
    while left and not delivery.is_over:
        now_left = delivery.drain(min(_LINE_S, timeout_s))
        if now_left != left or delivery.trouble is None:
            left, moved = now_left, time.monotonic()
            print(f"{total - left} of {total} delivered", flush=True)
        elif time.monotonic() - moved >= timeout_s:
            return


def _folder(run: str, output_dir: Path) -> Path:
    places = Path(run), output_dir / run / "latest"
    for place in places:
        if (place / FILE).is_file():
            return place.resolve()
    raise UsageError(
        f"no run {run!r}: neither {places[0]} nor {places[1]} has {FILE} (--output-dir says where runs are)"
    )


def _tracking_uri(folder: Path) -> str:
    """Return the address that the run itself has used, or else was to use."""
    if noted := Delivered.load(folder):
        return noted.uri
    for record in read_records(folder, 0, _FIRST_BYTES):
        if record.kind == "params" and (uri := record.payload["params"].get("tracking.uri")):
            return str(uri)
    raise UsageError(f"{folder} does not say which MLflow it is for: give --tracking-uri")
