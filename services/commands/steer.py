"""`srpo steer`: change what a training maximizes from its next step on, by a tag on its MLflow run.

config/steering.py describes the tag. What the run would refuse is refused here already, by the run file in MLflow.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from services.commands.usage import UsageError
from services.config.run import TrackingConfig, load_run_config
from services.config.steering import TAG, Steering, SteeringError, last_in_force

_DEFAULT_TRACKING_URI = TrackingConfig.model_fields["uri"].default


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo steer`."""
    parser.add_argument("run", metavar="RUN", help="the name or id in MLflow of a run that is training")
    parser.add_argument("--positive", metavar="WORD", help="the control word to move toward from now on")
    parser.add_argument("--negative", metavar="WORD", help="the control word to move away from from now on")
    parser.add_argument("--preference-scale", type=float, metavar="K", help="k at all levels, in place of schedules")
    parser.add_argument("--weights", metavar="NAME=NUMBER,…", help="weights of the run's rewards")
    parser.add_argument("--reset", action="store_true", help="go back to the run file in everything")
    parser.add_argument("--tracking-uri", default=_DEFAULT_TRACKING_URI, metavar="URI", help="of MLflow (%(default)s)")
    parser.epilog = "What is not given is as in the run file, whatever was requested before."
    parser.set_defaults(handler=_steer)


def _steer(args: argparse.Namespace) -> int:
    """Set the tag and print what it replaces. Raise SteeringError, ConfigError, or UsageError for MLflow's failures."""
    requested = _requested(args)
    from services.clients.tracking import Tracker, TrackingError  # here, because MLflow takes seconds to import

    try:
        tracker = Tracker.running(args.tracking_uri, args.run)
        with tempfile.TemporaryDirectory() as folder:
            requested.check(load_run_config(tracker.run_file(Path(folder))))
        tags = tracker.tags()
        before = _requested_last(tags.get(TAG), last_in_force(tags))
        requested = Steering.parse(requested.model_dump() | {"version": before.version + 1})
        tracker.set_tag(TAG, requested.to_tag())
    except TrackingError as error:
        raise UsageError(error) from error
    print(f"{args.run} from its next step on: {requested.summary}")
    print(f"before, {before.summary}")
    return 0


def _requested(args: argparse.Namespace) -> Steering:
    given = {name: getattr(args, name) for name in ("positive", "negative", "preference_scale")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.weights is not None:
        given["weights"] = dict(_weights(args.weights.split(",")))
    if not given and not args.reset:
        raise SteeringError("nothing is requested: give words, --preference-scale or --weights, or --reset")
    if given and args.reset:
        raise SteeringError("--reset goes back to the run file: give nothing beside it")
    return Steering.parse(given)


def _weights(items: Iterable[str]) -> Iterable[tuple[str, float]]:
    for item in items:
        name, _, number = item.rpartition("=")
        try:
            yield name.strip(), float(number)
        except ValueError as error:
            raise SteeringError(f"--weights: {item!r} is not NAME=NUMBER, as in hpsv2.1=1,pickscore=.5") from error


def _requested_last(tag: str | None, in_force: Steering) -> Steering:
    """Return what is in force, or what will be at the next step; a tag that the run refuses does not count."""
    try:
        return Steering.from_tag(tag).after(in_force)
    except SteeringError:
        return in_force
