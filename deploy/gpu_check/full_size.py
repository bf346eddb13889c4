"""Stage: one LoRA step of SRPO with FLUX.1-dev's architecture, VAE and HPS v2.1's, at random weights, beside the plan.

The step is made twice, and the second is reported: the first one loads kernels. Then once without recomputing
activations, to see what that costs in memory and saves in seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from deploy.gpu_check.meter import Meter, held_gib
from deploy.gpu_check.prediction import NO_PLANNER, predicted
from deploy.gpu_check.random_weights import num_parameters, random_conditioning, random_policy, write_reward
from deploy.gpu_check.report import Report
from deploy.gpu_check.sizes import Size
from deploy.gpu_check.training import OBJECTIVE, OPTIMIZER, MasterWeights, load_scorer, sampling_of, srpo_step
from reward_server.scoring.scorer import Scorer
from services.config.finetune import FinetuneConfig
from trainer.model.lora import add_adapter
from trainer.model.policy import Policy

_DTYPE = torch.bfloat16
_FINETUNE = FinetuneConfig(kind="lora")
_SEED = 0


def run(size: Size, device: torch.device, report: Report) -> None:
    """Build everything in place, then step."""
    report.add("transformer_parameters", num_parameters(size.transformer))
    meter = Meter(device)
    with tempfile.TemporaryDirectory(prefix="srpo-gpu-check-") as folder:
        meter.start("build_reward")
        scorer = load_scorer(*write_reward(size, Path(folder), device), device)
    meter.stop()
    held = {"reward_gib": round(held_gib(device), 3)}
    meter.start("build_policy")
    policy = random_policy(size, _DTYPE, device)
    meter.stop()
    held["reward_and_policy_gib"] = round(held_gib(device), 3)
    report.add("build", {"phases": meter.phases, "held": held})
    add_adapter(policy.transformer, _FINETUNE, _SEED)
    for name, checkpointing in (("lora_step", True), ("lora_step_without_checkpointing", False)):
        with report.attempt(name):
            if not checkpointing:
                policy.transformer.disable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' ModelMixin
                policy.vae.disable_gradient_checkpointing()
            step = lora_step(size, policy, scorer, device)
            report.add(name, step)
            plan = predicted(size, "lora", device, size.num_rollout_steps, checkpointing=checkpointing)
            beside = NO_PLANNER if plan is None else plan.beside(step["phases"], held["reward_gib"])
            report.add(name, step | {"plan": beside})


def lora_step(size: Size, policy: Policy, scorer: Scorer, device: torch.device) -> dict[str, Any]:
    """Make two steps on the policy's adapter; return the second one's phases and outcome."""
    trained = [each for each in policy.transformer.parameters() if each.requires_grad]
    for each in trained:
        each.data = each.data.to(_DTYPE)  # peft makes them float32; the engine trains them in the model's dtype
    is_fused = device.type == "cuda"
    trainer = MasterWeights(policy.transformer, OPTIMIZER, len(OBJECTIVE.branches), fused=is_fused)
    conditioning = random_conditioning(size, _DTYPE, device)
    sampling = sampling_of(policy, size.height_px, size.width_px, size.num_rollout_steps)
    for _ in range(2):
        meter = Meter(device)
        outcome = srpo_step(policy, trainer, conditioning, sampling, scorer, meter)
    return {
        "phases": meter.phases,
        "seconds": round(sum(each["seconds"] for each in meter.phases.values()), 4),
        "peak_gib": max(each["peak_gib"] for each in meter.phases.values()),
        "trained_parameters": sum(each.numel() for each in trained),
        "outcome": outcome,
    }
