"""Find what a plan compares with on this machine: its GPU as torch knows it, or its memory without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil

from services.config.run import RunConfig
from trainer.data.prompt_files import load_prompts
from trainer.plan.accelerators import Accelerator, accelerator, host, named_by_torch
from trainer.plan.checkpoint_configs import CheckpointConfigs
from trainer.plan.plan import Plan
from trainer.plan.planned_run import PlannedRun

GPUS_PER_HOST = 8
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def plan_of(
    config: RunConfig, name: str | None = None, gpus_per_host: int = GPUS_PER_HOST, configs: Path | None = None
) -> Plan:
    """Plan a run for the accelerator `name`, or else engine.accelerator, or else what is here. Raise PlanError."""
    found = accelerator_of(config, name or config.engine.accelerator)
    workers = gpus_per_host if config.engine.use_gpu else config.engine.min_workers
    run = PlannedRun.of(config, num_evaluation_prompts(config), workers)
    return Plan(run, CheckpointConfigs.find(config.model.path, configs), found)


def accelerator_of(config: RunConfig, name: str | None) -> Accelerator | None:
    """Return the accelerator of this name, this machine's, or its memory for a run on CPUs; None for no GPU here."""
    if not config.engine.use_gpu:
        return host(_memory_bytes(), config.engine.threads_per_worker)
    return accelerator(name) if name is not None else _gpu_here()


def num_evaluation_prompts(config: RunConfig) -> int:
    """Count the evaluation's prompts. Where the file is not, as many as a grid shows are taken, and a line says so."""
    path, evaluation = config.evaluation.prompts_path, config.evaluation
    if isinstance(path, Path) and not path.exists():
        print(f"plan: evaluation.prompts_path {path} is not here: {evaluation.num_grid_images} prompts assumed")
        return evaluation.num_grid_images
    return sum(1 for _ in load_prompts(path, config.prompts.column))


def _gpu_here() -> Accelerator | None:
    import torch  # on use: a plan for a named accelerator needs none of it

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = named_by_torch(found.name) or Accelerator(found.name, 0, 0, 0, 0, 0, 0, "not in the table")
    return replace(known, memory_bytes=found.total_memory)


def _memory_bytes() -> int:
    total = int(psutil.virtual_memory().total)
    limit = _LIMIT.read_text(encoding="ascii").strip() if _LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))
