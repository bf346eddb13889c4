"""Stage: a full fine-tuning step at two depths of the transformer, from which that of the whole one follows.

Seconds and memory of a FLUX transformer are linear in the number of its blocks. Shares of the depth that do not fit on
the card are left out; the depths that were measured are reported.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deploy.gpu_check.meter import Meter, held_gib
from deploy.gpu_check.prediction import NO_PLANNER, predicted
from deploy.gpu_check.random_weights import (
    at_depth,
    num_parameters,
    random_conditioning,
    random_policy,
    write_reward,
)
from deploy.gpu_check.report import Report
from deploy.gpu_check.sizes import Size
from deploy.gpu_check.training import OBJECTIVE, OPTIMIZER, MasterWeights, load_scorer, sampling_of, srpo_step
from reward_server.scoring.scorer import Scorer

_DTYPE = torch.bfloat16
# Of a trained weight: bfloat16 itself and its gradient, float32 master, gradient and AdamW's two averages.
_BYTES_PER_PARAMETER = 2 + 2 + 4 + 4 + 4 + 4
_ALL_ELSE_BYTES = 16 * 2**30  # reward, VAE, activations, workspace: what the LoRA step has beside its weights
_NUM_MEASURED = 2
_NUM_ROLLOUT_STEPS = 1  # a rollout is as many calls as it has steps


def run(size: Size, device: torch.device, report: Report) -> None:
    """Measure the two largest depths that fit, and extrapolate."""
    depths = fitting_depths(size, memory_bytes(device))
    report.add("depths", list(depths))
    with tempfile.TemporaryDirectory(prefix="srpo-gpu-check-") as folder:
        scorer = load_scorer(*write_reward(size, Path(folder), device), device)
    reward_gib = held_gib(device)
    steps: dict[float, dict[str, Any]] = {}
    for depth in reversed(depths):  # the smaller one first: a card that is too full then still tells something
        name = f"depth_{depth:g}"
        with report.attempt(name):
            part = replace(size, transformer=at_depth(size.transformer, depth))
            steps[depth] = full_step(part, scorer, device)
            report.add(name, steps[depth])
            plan = predicted(part, "full", device, _NUM_ROLLOUT_STEPS, checkpointing=True)
            beside = NO_PLANNER if plan is None else plan.beside(steps[depth]["phases"], reward_gib)
            report.add(name, steps[depth] | {"plan": beside})
        gc.collect()  # the last policy, before the next one is made
    if len(steps) == _NUM_MEASURED:
        report.add("whole_depth", extrapolated(size, steps))


def fitting_depths(size: Size, num_bytes: float) -> tuple[float, ...]:
    """Return the largest depths that fit into so much memory, two at most, largest first."""
    fitting = [
        depth
        for depth in size.depths
        if num_parameters(at_depth(size.transformer, depth)) * _BYTES_PER_PARAMETER + _ALL_ELSE_BYTES <= num_bytes
    ]
    return tuple(fitting[:_NUM_MEASURED])


def memory_bytes(device: torch.device) -> float:
    """Return the card's memory. Without a card there is no limit: only tiny models are run there."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def full_step(size: Size, scorer: Scorer, device: torch.device) -> dict[str, Any]:
    """Train all weights for two steps; return the second one's phases and outcome. The rollout is one call long."""
    policy = random_policy(size, _DTYPE, device)
    trainer = MasterWeights(policy.transformer, OPTIMIZER, len(OBJECTIVE.branches), fused=device.type == "cuda")
    conditioning = random_conditioning(size, _DTYPE, device)
    sampling = sampling_of(policy, size.height_px, size.width_px, _NUM_ROLLOUT_STEPS)
    for _ in range(2):
        meter = Meter(device)
        outcome = srpo_step(policy, trainer, conditioning, sampling, scorer, meter)
    return {
        "parameters": num_parameters(size.transformer),
        "phases": meter.phases,
        "outcome": outcome,
    }


def extrapolated(size: Size, steps: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """Continue the line through two depths to the whole one, by number of parameters. The rollout is one call."""
    whole = num_parameters(size.transformer)
    small, large = (steps[depth] for depth in sorted(steps))
    share = (whole - small["parameters"]) / (large["parameters"] - small["parameters"])
    return {
        "parameters": whole,
        "phases": {
            name: {
                key: round(entry[key] + share * (large["phases"][name][key] - entry[key]), 4)
                for key in ("seconds", "peak_gib")
            }
            for name, entry in small["phases"].items()
        },
    }
