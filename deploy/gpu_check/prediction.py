"""Put what `srpo plan` says of a step beside what was measured.

Both count the same: of the plan's memory, the workspace and DeepSpeed's buckets are left out, which the measured step
does not have in torch's allocator; of the measured memory, the reward model, which has a GPU of its own in a plan.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from deploy.gpu_check.meter import GIB
from deploy.gpu_check.sizes import Size
from deploy.settings import ROOT
from services.config.run import RunConfig

NO_PLANNER = "none: this checkout has no trainer/plan"
_MODEL = "black-forest-labs/FLUX.1-dev"  # whose text encoders the plan takes; the step has none
_APART = ("workspace and NCCL", "gradient buckets")
_MOMENTS = {"rollout": "rollout", "forward": "branch", "backward": "branch", "update": "update"}
_PHASES = {
    "rollout": ("rollout",),
    "forward": ("branches: forward", "branches: decode"),
    "reward": ("reward exchange",),
    "backward": ("branches: backward",),
    "update": ("optimizer step",),
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the plan says of each phase of a step: seconds, TFLOP and GiB, where it says them."""

    accelerator: str
    mfu: float
    phases: Mapping[str, Mapping[str, float]]

    def beside(self, measured: Mapping[str, Mapping[str, float]], reward_gib: float) -> dict[str, Any]:
        """Return planned and measured numbers of each phase, with measured / planned as the ratio."""
        rows: dict[str, Any] = {}
        for name, planned in self.phases.items():
            seconds, peak = measured[name]["seconds"], measured[name]["peak_gib"] - reward_gib
            row: dict[str, float] = {f"planned_{key}": _short(value) for key, value in planned.items()}
            if "seconds" in planned:
                row["seconds_ratio"] = _short(seconds / planned["seconds"])
                row["tflop_per_second"] = _short(planned["tflop"] / seconds)
            if "gib" in planned and peak > 0:
                row |= {"gib": round(peak, 3), "gib_ratio": _short(peak / planned["gib"])}
            rows[name] = row
        return {"accelerator": self.accelerator, "mfu": self.mfu, "phases": rows}


def predicted(
    size: Size, kind: Literal["full", "lora"], device: torch.device, num_rollout_steps: int, *, checkpointing: bool
) -> Prediction | None:
    """Return the plan's numbers for a step on this machine, or None if this checkout has no planner."""
    if find_spec("trainer.plan") is None:
        return None
    here, seconds = (import_module(f"trainer.plan.{name}") for name in ("here", "seconds"))
    config = _run(size, kind, device, num_rollout_steps, checkpointing=checkpointing)
    with tempfile.TemporaryDirectory(prefix="srpo-gpu-check-") as folder:
        plan = here.plan_of(config, gpus_per_host=1, configs=_configs(size, Path(folder)))
        cost = seconds.cost_if_known(plan, seconds.DEFAULT_MFU)
        moments = {each.name: each.kinds for each in plan.moments}
    phases: dict[str, dict[str, float]] = {}
    for name, parts in _PHASES.items():
        costs = [] if cost is None else [each for each in cost.phases if each.name in parts]
        if costs:
            phases[name] = {
                "seconds": sum(each.seconds for each in costs),
                "tflop": sum(each.flops for each in costs) / 1e12,
            }
        if name in _MOMENTS:
            kinds = moments[_MOMENTS[name]]
            alive = sum(value for kind, value in kinds.items() if kind not in _APART)
            phases.setdefault(name, {})["gib"] = alive / GIB
    accelerator = "none is known" if plan.accelerator is None else plan.accelerator.name
    return Prediction(accelerator, seconds.DEFAULT_MFU, phases)


def _run(size: Size, kind: str, device: torch.device, num_rollout_steps: int, *, checkpointing: bool) -> RunConfig:
    """Return the run file of which the measured step is one."""
    prompts = ROOT / "deploy" / "tiny" / "prompts" / "test.txt"
    sides = {"height_px": size.height_px, "width_px": size.width_px}
    return RunConfig.model_validate(
        {
            "name": "gpu_check",
            "num_steps": 1,
            "model": {"path": _MODEL, "dtype": "bfloat16", **sides, "max_sequence_length": size.num_text_tokens},
            "prompts": {"path": prompts, "embeddings_path": prompts.parent},
            "control_words": {"positive": "3D", "negative": "Flat"},
            "rollout": {"num_steps": num_rollout_steps},
            "rewards": [{"name": "hpsv2.1"}],
            "optimizer": {"learning_rate": 1e-5},
            "finetune": {"kind": kind},
            "engine": {"use_gpu": device.type == "cuda", "gradient_checkpointing": checkpointing},
            "evaluation": {"prompts_path": prompts, "batch": 1},
        }
    )


def _configs(size: Size, folder: Path) -> Path:
    """Write the configs of a checkpoint with this transformer and VAE, and the published text encoders."""
    published = Path(import_module("trainer.plan").__path__[0]) / "published" / _MODEL
    for source in published.rglob("*.json"):
        target = folder / source.relative_to(published)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name, own in (("transformer", size.transformer), ("vae", size.vae)):
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | own), encoding="utf-8")
    return folder


def _short(number: float) -> float:
    """Return four digits of a number of any size."""
    return float(f"{number:.4g}")
