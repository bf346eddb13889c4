"""Stage: the reward at its full size in each precision: images a second, and errors against float32.

Two speeds: `model` is the network on images that are on the device; `scorer` takes them from host memory and brings
rewards and gradients back, as the service's replicas do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.gpu_check.float32 import tf32
from deploy.gpu_check.meter import held_gib, peak_gib, seconds_of
from deploy.gpu_check.random_weights import write_reward
from deploy.gpu_check.report import Report
from deploy.gpu_check.sizes import Size
from deploy.gpu_check.training import PAIR, REWARD, load_scorer, local_score
from reward_server.models import Hpsv2Args
from reward_server.scoring.scorer import Scorer
from services.contract import Float32, RewardResponse

_SEED = 2
_SCALE = 0.1  # k
_MIN_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Precision:
    """How the network runs. settings: of the reward's arguments. runs_under: a context of every call."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    runs_under: Callable[[], AbstractContextManager[Any]] = nullcontext


def precisions(device: torch.device) -> list[Precision]:
    """Return float32 first, then what is compared with it."""
    halves = ("bfloat16", "float16")
    autocast = [
        Precision(f"{name} autocast", {}, lambda name=name: torch.autocast(device.type, getattr(torch, name)))  # type: ignore[misc]  # bound by name
        for name in halves
    ]
    has_dtype = "dtype" in Hpsv2Args.model_fields
    own = [Precision(f"{name} weights", {"dtype": name}) for name in halves] if has_dtype else []
    return [Precision("float32"), Precision("tf32", {}, lambda: tf32(True)), *autocast, *own]


def run(size: Size, device: torch.device, report: Report) -> None:
    """Measure each precision on the same images."""
    images = np.random.default_rng(_SEED).random(
        (max(size.reward_batches), 3, size.height_px, size.width_px), dtype=np.float32
    )
    with tempfile.TemporaryDirectory(prefix="srpo-gpu-check-") as folder, tf32(False):
        architecture, file = write_reward(size, Path(folder), device)
        loaded: tuple[dict[str, Any], Scorer] | None = None
        exact: RewardResponse | None = None
        for precision in precisions(device):
            with report.attempt(precision.name):
                if loaded is None or loaded[0] != precision.settings:
                    loaded = None  # its memory, before the next one's
                    loaded = precision.settings, load_scorer(architecture, file, device, **precision.settings)
                with precision.runs_under():
                    answer, speeds = _measured(loaded[1], images, size, device)
                exact = answer if exact is None else exact
                errors = compared(answer, exact)
                report.add(precision.name, {"speeds": speeds, "errors": errors, "held_gib": held_gib(device)})
                report.check(f"{precision.name}: cosine of gradients", errors["worst_cosine"], at_least=_MIN_COSINE)


def _measured(
    scorer: Scorer, images: Float32, size: Size, device: torch.device
) -> tuple[RewardResponse, list[dict[str, Any]]]:
    """Return the answer for some of the images, and images a second by batch."""
    speeds = []
    for batch in size.reward_batches:
        entry: dict[str, Any] = {"batch": batch}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for name, call in _calls(scorer, images[:batch], device).items():
            seconds = seconds_of(call, device, num_warm_ups=size.num_warm_ups, num_calls=size.num_calls)
            entry[f"{name}_images_per_second"] = round(batch / seconds, 2)
        speeds.append(entry | {"peak_gib": round(peak_gib(device), 3)})
    few = images[: min(size.reward_batches[-1], 8)]
    answer = local_score(scorer)(REWARD, few, (PAIR,) * len(few), (_SCALE,) * len(few), True)
    return answer, speeds


def _calls(scorer: Scorer, images: Float32, device: torch.device) -> dict[str, Callable[[], object]]:
    pairs, scales = (PAIR,) * len(images), (_SCALE,) * len(images)
    reward, score = scorer.rewards[REWARD], local_score(scorer)
    similarities = reward.similarities(reward.prepare(pairs))
    on_device = torch.from_numpy(images).to(device)

    def forward() -> Tensor:
        with torch.inference_mode():
            return similarities(on_device)[0]

    def gradient() -> Tensor:
        leaf = on_device.detach().requires_grad_()
        positive, negative = similarities(leaf)
        (grad,) = torch.autograd.grad(((1 + _SCALE) * positive - negative).sum(), leaf)
        return grad

    return {
        "model_forward": forward,
        "model_gradient": gradient,
        "scorer_forward": lambda: score(REWARD, images, pairs, scales, False),
        "scorer_gradient": lambda: score(REWARD, images, pairs, scales, True),
    }


def compared(answer: RewardResponse, exact: RewardResponse) -> dict[str, float]:
    """Return the largest error of a reward, relative to the spread of a similarity, and of the gradients."""
    ours, theirs = (torch.from_numpy(np.array(each.image_gradient)).flatten(1).double() for each in (answer, exact))
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=1)
    return {
        "largest_reward_error": float(np.abs(answer.rewards - exact.rewards).max()),
        "largest_reward": float(np.abs(exact.rewards).max()),
        "worst_cosine": float(cosines.min()),
        "largest_gradient_error": float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()),
    }
