"""Train a network: one loop for every stage, with warm-up and decay, an average of the weights, and a checkpoint.

Step `n` of a stage draws its randomness from (seed, n) alone, so that a stage that was interrupted goes on from its
checkpoint as if it had not been.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_SAVE_EVERY, _REPORT_EVERY, _STEPS_PER_SEED = 500, 250, 1_000_000


@dataclass(frozen=True)
class Step:
    """What a loss may depend on: the share of the training that is done, and a generator for Python's randomness."""

    share: float
    random: random.Random


@dataclass(frozen=True)
class Settings:
    """AdamW with a learning rate that warms up, stays, and from `decay_from` of the steps on falls to a fiftieth."""

    seed: int
    num_steps: int
    learning_rate: float
    ema_decay: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    decay_from: float = 0.3

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        decay = (1 - step / self.num_steps) / (1 - self.decay_from)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, max(decay, 0.02))


def fit(
    name: str,
    net: Module,
    loss_of: Callable[[Module, Module, Step], Tensor],
    settings: Settings,
    checkpoint: Path,
    after_step: Callable[[Module], None] | None = None,
) -> Any:
    """Train `net` on its device and return the average of its weights, in eval mode.

    loss_of: (net, average, step) -> loss. after_step: called with `net` after each update. The training goes on from
    `checkpoint` if there is one, and removes it at its end.
    """
    average: Any = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=settings.weight_decay, betas=settings.betas)
    first = _load(checkpoint, net, average, optimizer)
    started, losses = time.monotonic(), torch.zeros((), device=next(net.parameters()).device)
    for number in range(first, settings.num_steps):
        torch.manual_seed(settings.seed * _STEPS_PER_SEED + number)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(number)
        step = Step(number / settings.num_steps, random.Random(f"{settings.seed} {number}"))
        loss = loss_of(net, average.module, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        if after_step is not None:
            after_step(net)
        losses += loss.detach()
        if (number + 1) % _REPORT_EVERY == 0:
            seconds = time.monotonic() - started
            print(
                f"{name} {number + 1}/{settings.num_steps} loss {losses / _REPORT_EVERY:.4f} {seconds:.0f} s",
                flush=True,
            )
            losses.zero_()
        if (number + 1) % _SAVE_EVERY == 0:
            _save(checkpoint, net, average, optimizer, number + 1)
    checkpoint.unlink(missing_ok=True)
    return average.module.eval()


def _save(checkpoint: Path, net: Module, average: Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"net": net.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step}, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


def _load(checkpoint: Path, net: Module, average: Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the step at which to go on."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location=next(net.parameters()).device, weights_only=True)
    net.load_state_dict(state["net"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
