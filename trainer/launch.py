"""Launch a training on Ray Train: `python -m trainer.launch RUN.yaml`, as a Ray job or in the foreground.

The MLflow run begins and ends here, so that it also tells of a run that was stopped or whose workers died for good.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from services.clients.reward import RewardError
from services.clients.tracking import RunStatus, Tracker, TrackingError
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.evaluation.stop_rules import BEST_STEP
from trainer.runtime.cluster import ClusterError, connect, worker_environment
from trainer.runtime.failures import EndAtMistakes, cause, mistakes_named
from trainer.runtime.paths import with_absolute_paths
from trainer.runtime.preflight import check_run

_EXIT_STOPPED = 130
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # by default a reported checkpoint holds the workers up for 1.5 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing here acts on its warnings
}


class LaunchError(RuntimeError):
    """The run failed for good; the text names the cause."""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 with a line on stderr, or 130 after a stop."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="Align a model as a run file says.")
    parser.add_argument("run_file", type=Path, help="for example deploy/runs/tiny_srpo.yaml")
    run_file: Path = parser.parse_args(arguments).run_file
    try:
        config = with_absolute_paths(load_run_config(run_file))
        check_run(config)
        url = launch(config, run_file)
    except (ConfigError, RewardError, TrackingError, LaunchError, ClusterError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _EXIT_STOPPED
    print(f"done: {config.output_dir / config.name}  {url}")
    return 0


def launch(config: RunConfig, run_file: Path) -> str:
    """Train under a new MLflow run and end that as FINISHED, FAILED or KILLED. Return its URL.

    Raise LaunchError, TrackingError or KeyboardInterrupt.
    """
    tracker = Tracker.start(config.tracking.uri, config.tracking.experiment, config.name)
    status: RunStatus = "FAILED"
    try:
        tracker.log_config(config)
        tracker.log_file(run_file)
        connect(config)
        make_trainer(config, tracker.run_id).fit()
        status = "FINISHED"
    except TrainingFailedError as error:
        raise LaunchError(cause(error)) from error
    except (KeyboardInterrupt, SystemExit) as stop:  # Ray's own handlers of ctrl-C and SIGTERM exit
        status = "KILLED"
        raise KeyboardInterrupt from stop
    finally:
        try:
            finish(tracker, status)  # before the shutdown: `ray job stop` waits only 3 s before it kills
        finally:
            ray.shutdown()  # takes controller and workers along
    return tracker.url


def finish(tracker: Tracker, status: RunStatus) -> None:
    """End the MLflow run. Raise TrackingError only after a success: it would hide the cause of anything else."""
    try:
        tracker.finish(status)
    except TrackingError as error:
        if status == "FINISHED":
            raise
        print(f"warning: {error}", file=sys.stderr)


def make_trainer(config: RunConfig, run_id: str) -> TorchTrainer:
    """Return the run as Ray Train sees it. Its checkpoints lie under the MLflow run's id: no run resumes another's."""
    engine, checkpoint = config.engine, config.checkpoint
    os.environ.update(_TRAIN_SETTINGS)
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_dump_json(), "run_id": run_id},
        torch_config=TorchConfig(backend="nccl" if engine.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=engine.num_workers,
            use_gpu=engine.use_gpu,
            resources_per_worker={"CPU": engine.cpus_per_worker},
        ),
        run_config=RayRunConfig(
            name=run_id,
            storage_path=str(config.output_dir / config.name / "checkpoints"),
            failure_config=FailureConfig(max_failures=checkpoint.max_failures),
            checkpoint_config=CheckpointConfig(checkpoint.num_kept, BEST_STEP if config.guard else None),
            callbacks=[EndAtMistakes()],
            worker_runtime_env={"env_vars": worker_environment(config)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_worker(settings: dict[str, Any]) -> None:
    from trainer.train import train_worker  # in the worker: the launching process needs neither model nor DeepSpeed

    with mistakes_named():
        train_worker(RunConfig.model_validate_json(settings["config"]), settings["run_id"])


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    exit_code = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)  # all is closed by now; after a stop Ray's threads can abort a normal exit
