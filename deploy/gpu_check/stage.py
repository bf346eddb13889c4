"""Run one stage in this process, and note the machine that it ran on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deploy.gpu_check import embedded, full_size, half_depth, kernels, reward_speed
from deploy.gpu_check.report import Report, describe
from deploy.gpu_check.sizes import Size

_PACKAGES = ("diffusers", "transformers", "peft", "open_clip_torch", "torchvision", "safetensors", "numpy", "pydantic")


def run_stage(name: str, size: Size, device: torch.device, path: Path, vectors: Sequence[Path]) -> None:
    """Run a stage into the JSON file `path`. What ends it too early is noted there, and raised."""
    report = Report(path, name)
    report.add("machine", machine(device))
    try:
        if name == "embedded":
            embedded.run(device, vectors, report)
        else:
            sized = {"full_size": full_size, "half_depth": half_depth, "reward_speed": reward_speed, "kernels": kernels}
            sized[name].run(size, device, report)
    except Exception as error:
        report.finish("failed", describe(error))
        raise
    report.finish("done")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the card's name and memory, and the versions that make numbers comparable."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        facts["card"] = f"none, on {device.type}"
    return facts | {"packages": {name: metadata.version(name) for name in _PACKAGES}}
