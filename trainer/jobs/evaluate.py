"""`srpo evaluate RUN.yaml [MODEL …]`: compare models with the base model on held-out prompts, with intervals.

`python -m trainer.jobs.evaluate`, as a Ray job or in the foreground. Every policy draws the same prompts from the same
noise. Every reward that the service has, every judge and every statistic measures the pictures. One worker is this
process; several are Ray Train's, as in a training. What was drawn and measured is kept, so that an evaluation that was
stopped goes on where it was, and the next one draws the base model no more.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from services.clients.checkpoint_store import files_of
from services.clients.reward import RewardClient, RewardError
from services.clients.run_folder import LATEST
from services.clients.tracking import RunStatus, Tracker, TrackingError
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.evaluation.report import Column
from trainer.jobs.evaluate_plan import BASE, ORACLE, Plan, make_plan
from trainer.jobs.evaluate_report import compare, write_report, write_viewing
from trainer.jobs.evaluate_share import EvaluateError, draw_and_measure
from trainer.runtime.cluster import ClusterError
from trainer.runtime.paths import with_absolute_paths

_EXIT_STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 with a line on stderr, or 130 after a stop."""
    parser = argparse.ArgumentParser(prog="srpo evaluate", description="Compare models with a run's base model.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("models", nargs="*", help="[NAME=]FOLDER: a model or a checkpoint (the run's own model)")
    args = parser.parse_args(arguments)
    try:
        config = load_run_config(args.run_file)
        folders = named_folders(args.models or [f"aligned={config.output_dir / config.name / LATEST / 'model'}"])
        report, url = evaluate(config, folders)
    except (
        ConfigError, RewardError, TrackingError, ClusterError, SafetensorError, ValueError, OSError,
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return _EXIT_STOPPED
    print(f"done: {report}  {url}")
    return 0


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the policies to compare with the base model, by name. Raise EvaluateError.

    >>> named_folders(["step40=outputs/x/latest/checkpoints/step_00000040_f00ba4"])
    {'step40': PosixPath('outputs/x/latest/checkpoints/step_00000040_f00ba4')}
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        name = name or Path(path).name
        if name in (BASE, ORACLE) or name in folders:
            raise EvaluateError(f"two policies are called {name!r}: name them, as in other={path}")
        if not (Path(path) / "model_index.json").is_file() and not files_of(Path(path)):
            raise EvaluateError(
                f"{path} is neither a model folder nor a checkpoint: give one, or run the training first"
            )
        folders[name] = Path(path)
    return folders


def evaluate(config: RunConfig, folders: Mapping[str, Path]) -> tuple[Path, str]:
    """Draw with each policy, measure, bootstrap, write the report. Return its path and the MLflow run's URL."""
    config = with_absolute_paths(config)
    folder = config.output_dir / config.name / "comparison"
    tracker = Tracker.start(config.tracking.uri, config.tracking.experiment, f"{config.name} {folder.name}")
    status: RunStatus = "FAILED"
    try:
        plan = make_plan(config, folders, _served(config), folder / "kept")
        print_kept(plan, folder / "kept")
        spread(config, plan, folder / "workers" / tracker.run_id)
        columns = compare(config, plan)
        files = (*write_report(config, plan, columns, folder), *write_viewing(config, plan, folder))
        for column in columns:
            tracker.log_metrics(dict(_flat(column)), step=0)
        for file in files:
            tracker.log_file(file)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as stop:  # Ray's own handlers of ctrl-C and SIGTERM exit
        status = "KILLED"
        raise KeyboardInterrupt from stop
    finally:
        tracker.finish(status)
    return files[0], tracker.url


def print_kept(plan: Plan, folder: Path) -> None:
    """Print, for each policy of which something is kept, how much need not be drawn or measured again."""
    num_images = len(plan.prompts)
    for policy in plan.policies:
        num_drawn, num_measured = plan.num_kept(policy.drawn), plan.num_kept(policy.measured)
        if num_drawn:
            print(
                f"{policy.name}: {num_drawn} of {num_images} pictures are drawn already, {num_measured} are measured "
                f"({folder})",
                flush=True,
            )


def spread(config: RunConfig, plan: Plan, ray_folder: Path) -> None:
    """Draw and measure what is missing, here or on several workers. Raise EvaluateError or ClusterError."""
    if plan.is_done:
        return
    if config.engine.num_workers == 1:
        draw_and_measure(config, plan, torch.device("cuda" if config.engine.use_gpu else "cpu"))
        return
    from trainer.jobs.evaluate_workers import run_workers  # on use: one worker needs no Ray

    run_workers(config, plan, ray_folder)


def _served(config: RunConfig) -> dict[str, str | None]:
    """Return the rewards that are served, and the checksums of their weights."""
    service = config.reward_service
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts) as client:
        return client.models()


def _flat(column: Column) -> Iterator[tuple[str, float]]:
    for kind, numbers in (("", column.numbers), ("_difference", column.differences)):
        for name, value in numbers.items():
            for end, number in asdict(value).items():
                yield f"{column.name}/{name}{kind}" + ("" if end == "value" else f"_{end}"), number


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    exit_code = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)  # all is closed by now; after a stop Ray's threads can abort a normal exit
