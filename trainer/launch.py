"""Launch a training on Ray Train, as a Ray job or in the foreground; begin a run or take one up.

    python -m trainer.launch RUN.yaml [--resume RUN_ID|latest|auto] [--set KEY=VALUE …]

The run's folder is made here, and its record begins and ends here. So it also tells of a run that was stopped or whose
workers died for good.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_logging
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from services.clients.checkpoint_store import CheckpointError, CheckpointStore, checkpoint_location
from services.clients.reward import RewardError
from services.clients.run_folder import RunFolder, RunFolderError
from services.clients.tracking import RunStatus
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.runtime.cluster import ClusterError, connect, worker_environment
from trainer.runtime.elastic import RESIZE_S, CheckpointBeforeResize
from trainer.runtime.failures import EndAtMistakes, mistakes_named
from trainer.runtime.fitting import LaunchError, StoppedError, fit
from trainer.runtime.out_of_memory import what_to_lower
from trainer.runtime.paths import with_absolute_paths
from trainer.runtime.planning import require_fit
from trainer.runtime.preflight import check_run
from trainer.runtime.resources import Asked, worker_resources
from trainer.runtime.run_record import begin, can_go_on, create, end, take_up
from trainer.runtime.waiting import waiting_told

_EXIT_STOPPED = 130
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # how soon a death is noticed; 2 s by default
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a frozen process is replaced after it; 10 minutes by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would stop what still can train; stopping.py watches
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
}
_MISTAKES = (ConfigError, RewardError, RunFolderError, CheckpointError, LaunchError, ClusterError, ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 with a line on stderr, or 130 after a stop."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="Align a model as a run file says.")
    parser.add_argument("run_file", type=Path, help="for example deploy/runs/tiny_srpo.yaml")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN_ID|latest|auto", help="take a run up")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run file")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        config = with_absolute_paths(load_run_config(args.run_file, args.set))
        check_run(config)
        require_fit(config)
        launch(config, args.run_file, args.resume)
    except _MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped before the training began", file=sys.stderr)
        return _EXIT_STOPPED
    except StoppedError as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return _EXIT_STOPPED
    return 0


def launch(config: RunConfig, run_file: Path, resume: str | None = None) -> RunFolder:
    """Train a new run, or take up the one that `resume` names, and end its record as FINISHED, FAILED or KILLED.

    resume: a run's id, `latest`, or `auto`, which begins a new run unless the newest can go on. Raise LaunchError,
    StoppedError, RunFolderError or ResumeError.
    """
    is_new = resume is None or (resume == "auto" and not can_go_on(config))
    wanted = "latest" if resume == "auto" else str(resume)
    run = create(config) if is_new else RunFolder.find(config.output_dir, config.name, wanted)
    with run.locked():
        if is_new:
            begin(config, run, run_file)
        else:
            take_up(config, run, run_file)
        try:
            _train(config, run)
        except (LaunchError, StoppedError) as error:
            raise type(error)(f"{error}\n{_how_to_resume(config, run, run_file)}") from error
    print(f"done: {run.path}", flush=True)
    return run


def _train(config: RunConfig, run: RunFolder) -> None:
    status: RunStatus = "FAILED"
    ray_logging.RAY_DEDUP_LOGS = False  # Ray would leave out lines of steps; its variable is read before this file
    try:
        connect(config)
        with waiting_told(Asked.of(config.engine)):
            fit(make_trainer(config, run), run)
        status = "FINISHED"
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        try:
            end(config, run, status)
        finally:
            ray.shutdown()  # takes controller and workers along


def _how_to_resume(config: RunConfig, run: RunFolder, run_file: Path) -> str:
    """Return a line that says what is saved, and how to go on from it."""
    saved = CheckpointStore(checkpoint_location(config, run)).manifests()
    state = f"step {saved[-1].step} of {config.num_steps} is saved" if saved else "no step is saved"
    return f"{state}; go on with: srpo run {run_file} --resume {run.id}"


def make_trainer(config: RunConfig, run: RunFolder) -> TorchTrainer:
    """Return the run as Ray Train sees it. Checkpoints are ours (checkpoints.py): Ray is told of none."""
    os.environ.update(_TRAIN_SETTINGS)
    engine = config.engine
    is_elastic = engine.min_workers < engine.max_workers
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_dump_json(), "run": str(run.path)},
        torch_config=TorchConfig(backend="nccl" if engine.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(engine.min_workers, engine.max_workers) if is_elastic else engine.max_workers,
            use_gpu=engine.use_gpu,
            resources_per_worker=worker_resources(engine),
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            callbacks=[
                EndAtMistakes(what_to_lower(config)),
                *([CheckpointBeforeResize(run.path)] if is_elastic else []),
            ],
            worker_runtime_env={"env_vars": worker_environment(config)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _train_worker(settings: dict[str, Any]) -> None:
    from trainer.train import train_worker  # in the worker: the launching process needs neither model nor DeepSpeed

    config = RunConfig.model_validate_json(settings["config"])
    with mistakes_named(what_to_lower(config)):
        train_worker(config, RunFolder(Path(settings["run"])))


if __name__ == "__main__":
    exit_code = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)  # all is closed by now; after a stop Ray's threads can abort a normal exit
