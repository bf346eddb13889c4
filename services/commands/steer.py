"""`srpo steer`: tell a training what to maximise from its next step on, by a tag on its MLflow run (steering.py).

What the run would refuse is refused here already, by the run file that MLflow keeps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from services.clients.tracking import Tracker
from services.config.run import load_run_config
from services.config.steering import TAG, Steering, SteeringError, last_in_force


def steer_run(args: argparse.Namespace) -> int:
    """Set the tag and say what it replaces. Raises SteeringError, TrackingError or ConfigError; else exit code 0."""
    asked = _asked(args)
    tracker = Tracker.running(args.tracking_uri, args.run)
    with tempfile.TemporaryDirectory() as folder:
        asked.check(load_run_config(tracker.run_file(Path(folder))))
    tags = tracker.tags()
    before = _asked_last(tags.get(TAG), last_in_force(tags))
    asked = Steering.parse(asked.model_dump() | {"version": before.version + 1})
    tracker.set_tag(TAG, asked.to_tag())
    print(f"{args.run} from its next step on: {asked.summary}")
    print(f"before, {before.summary}")
    return 0


def _asked(args: argparse.Namespace) -> Steering:
    given = {name: getattr(args, name) for name in ("positive", "negative", "preference_scale")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.weights is not None:
        given["weights"] = dict(_weights(args.weights.split(",")))
    if not given and not args.reset:
        raise SteeringError("nothing is asked for: give words, --preference-scale or --weights, or --reset")
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


def _asked_last(tag: str | None, in_force: Steering) -> Steering:
    """What the run has been told, or will take at its next step; a tag that it refuses counts for nothing."""
    try:
        return Steering.from_tag(tag).after(in_force)
    except SteeringError:
        return in_force
