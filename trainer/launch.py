"""A run file -> a training on Ray Train: `python -m trainer.launch RUN.yaml`, as a Ray job or in the foreground.

Whatever can be known to be wrong is found before a worker starts, and said in one line. The MLflow run is opened and
ended here, so that it also tells of a run that was stopped or whose workers died for good.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from pydantic import BaseModel
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from services.clients.reward import RewardClient, RewardError
from services.clients.tracking import RunStatus, Tracker, TrackingError
from services.config.prompts import absolute
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.data.batches import open_batches
from trainer.data.conditioning import check_embeddings, drawn_prompts, judged_prompts
from trainer.data.latents import require_unchanged
from trainer.evaluation.stop_rules import BEST_STEP
from trainer.flow import level_sigmas, num_delta_levels
from trainer.model.loading import check_model_path
from trainer.runtime.failures import EndAtMistakes, cause, mistakes_named
from trainer.runtime.preflight import require_accepted

_ROOT = Path(__file__).resolve().parent.parent
_EXIT_STOPPED = 130
_CONNECT_TIMEOUT_S = 5
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # by default a reported checkpoint holds the workers up for 1.5 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing here acts on its warnings
}


Section = TypeVar("Section", bound=BaseModel)


class LaunchError(RuntimeError):
    """The run cannot start, or it failed for good; the text names the cause."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="Align a model as a run file says.")
    parser.add_argument("run_file", type=Path, help="for example deploy/runs/tiny_srpo.yaml")
    run_file: Path = parser.parse_args(arguments).run_file
    try:
        config = with_absolute_paths(load_run_config(run_file))
        validate(config)
        url = launch(config, run_file)
    except (ConfigError, RewardError, TrackingError, LaunchError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _EXIT_STOPPED
    print(f"done: {config.output_dir / config.name}  {url}")
    return 0


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The run with absolute paths: workers run in folders of their own. A model that is not here stays a hub id."""
    model, evaluation = config.model, config.evaluation
    path = str(Path(model.path).resolve()) if Path(model.path).exists() else model.path
    judges = evaluation.judge_path and evaluation.judge_path.resolve()
    reference = evaluation.reference_path and evaluation.reference_path.resolve()
    held_out = {
        "prompts_path": absolute(evaluation.prompts_path),
        "judge_path": judges,
        "reference_path": reference,
    }
    guard = config.guard
    if guard is not None and guard.prompts_path is not None:
        guard = guard.model_copy(update={"prompts_path": absolute(guard.prompts_path)})
    prompts = config.prompts
    embeddings = prompts.embeddings_path and prompts.embeddings_path.resolve()
    read_from = {"path": prompts.path and absolute(prompts.path), "embeddings_path": embeddings}
    return config.model_copy(
        update={
            "output_dir": config.output_dir.resolve(),
            "model": model.model_copy(update={"path": path}),
            "prompts": prompts.model_copy(update=read_from),
            "dataset": _resolved(config.dataset, "path", "latents_path"),
            "evaluation": evaluation.model_copy(update=held_out),
            "guard": guard,
        }
    )


def _resolved(section: Section | None, *paths: str) -> Section | None:
    return section and section.model_copy(update={name: getattr(section, name).resolve() for name in paths})


def validate(config: RunConfig) -> None:
    """Raise, naming the thing and the cure, for what would otherwise fail in a worker minutes later."""
    check_model_path(config.model.path)
    folder = Path(config.model.path)
    open_batches(config, folder if (folder / "vae").is_dir() else None)
    require_unchanged(config)
    drawn, judged = drawn_prompts(config), judged_prompts(config)
    check_embeddings(config, (each.prompt for each in (*drawn, *judged)))
    judges = config.evaluation.judge_path
    if judges is not None and not judges.is_dir():
        raise LaunchError(f"evaluation.judge_path {judges} is not a folder: give one, or null to do without judges")
    if config.evaluation.reference_path is not None:
        from trainer.evaluation.measurements import picture_files  # on use: only such a run waits for transformers

        picture_files(config.evaluation.reference_path)
    shift, objective = config.rollout.shift, config.objective
    if shift != "dynamic" or objective.sigma_range is not None:  # else the workers look, who have the model
        num_delta_levels(objective, level_sigmas(objective, 1.0 if shift == "dynamic" else shift))
    service = config.reward_service
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=2) as client:
        offered = client.models()
    for index, reward in enumerate(config.rewards):
        if reward.name not in offered:
            raise LaunchError(
                f"rewards.{index}.name {reward.name!r} is not served at {service.url}; served: {', '.join(offered)}"
            )
    if config.guard is not None:
        from trainer.evaluation.guard import check_guard  # on use, as above

        check_guard(config, config.guard, offered)
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts) as client:
        require_accepted(client, config, drawn, judged)


def check_cluster(address: str) -> None:
    """Raise LaunchError if nothing listens at `address` (host:port, also ray://…), on which ray.init waits for ever."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.port is None:
        return  # "", "auto" or "local"
    try:
        socket.create_connection((place.hostname, place.port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS") from error


def launch(config: RunConfig, run_file: Path) -> str:
    """Train under a new MLflow run, and end that as FINISHED, FAILED or KILLED. Returns where to see it.

    Raises LaunchError, TrackingError or KeyboardInterrupt.
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
    """End the MLflow run. Raises TrackingError only after a success: anything else has a cause, which it would hide."""
    try:
        tracker.finish(status)
    except TrackingError as error:
        if status == "FINISHED":
            raise
        print(f"warning: {error}", file=sys.stderr)


def connect(config: RunConfig) -> None:
    """Join the cluster at RAY_ADDRESS or on this machine; if there is none, start one that ends with this process."""
    num_cpus = math.ceil(config.engine.num_workers * config.engine.cpus_per_worker)
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), logging_level="WARNING")
    except ConnectionError:
        if "RAY_ADDRESS" in os.environ:
            raise
        cores = max(num_cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, logging_level="WARNING")
    present = ray.cluster_resources().get("CPU", 0)
    if present < num_cpus:
        print(f"waiting for {num_cpus} CPUs (engine.num_workers × cpus_per_worker): the cluster has {present:g}")


def make_trainer(config: RunConfig, run_id: str) -> TorchTrainer:
    """The run as Ray Train sees it. Its checkpoints lie under the MLflow run's id: no run takes up another's."""
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


def worker_environment(config: RunConfig) -> dict[str, str]:
    """What a process that computes for the run needs in its environment."""
    python_path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(python_path),  # a checkout that is not installed
        "OMP_NUM_THREADS": str(config.engine.threads_per_worker),  # read on import, before torch.set_num_threads
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars of loaders, which a log cannot show
    }
    return environment if config.engine.use_gpu else environment | {"DS_ACCELERATOR": "cpu"}


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
    os._exit(exit_code)  # all is closed by now; after a stop Ray's threads can abort the interpreter's own way out
