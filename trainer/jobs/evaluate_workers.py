"""Run an evaluation on several workers of Ray Train, with the resources and restarts of the run's training."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from services.config.run import RunConfig
from trainer.jobs.evaluate_plan import Plan
from trainer.jobs.evaluate_share import EvaluateError, draw_and_measure
from trainer.runtime.cluster import check_cluster, connect, worker_environment
from trainer.runtime.failures import EndAtMistakes, cause, mistakes_named

_RAY_SETTINGS = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing here acts on its warnings
}


def run_workers(config: RunConfig, plan: Plan, folder: Path) -> None:
    """Draw and measure what is missing; Ray Train leaves its own files in `folder`. Raise EvaluateError, ClusterError.

    Workers are restarted as often as checkpoint.max_failures says, and go on where they were.
    """
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    connect(config)
    try:
        make_trainer(config, plan, folder).fit()
    except TrainingFailedError as error:
        raise EvaluateError(cause(error)) from error
    finally:
        ray.shutdown()  # takes controller and workers along


def make_trainer(config: RunConfig, plan: Plan, folder: Path) -> TorchTrainer:
    """Return the evaluation as Ray Train sees it."""
    engine = config.engine
    os.environ.update(_RAY_SETTINGS)
    return TorchTrainer(
        _evaluate_worker,
        train_loop_config={"config": config.model_dump_json(), "plan": plan.to_dict()},
        torch_config=TorchConfig(backend="gloo"),  # the workers exchange nothing
        scaling_config=ScalingConfig(
            num_workers=engine.max_workers,
            use_gpu=engine.use_gpu,
            resources_per_worker={"CPU": engine.cpus_per_worker},
        ),
        run_config=RayRunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            callbacks=[EndAtMistakes()],
            worker_runtime_env={"env_vars": worker_environment(config)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _evaluate_worker(settings: dict[str, Any]) -> None:
    config, context = RunConfig.model_validate_json(settings["config"]), ray.train.get_context()
    logging.getLogger().setLevel(logging.WARNING)  # Ray sets INFO: a line for every request
    torch.set_num_threads(config.engine.threads_per_worker)
    place = context.get_world_rank(), context.get_world_size()
    with mistakes_named():
        draw_and_measure(config, Plan.from_dict(settings["plan"]), get_device(), *place)
