"""Collect the metrics of one training step on each worker, and average them over all workers.

metrics = StepMetrics()
with metrics.timed("rollout"):
    ...
metrics.add("reward_denoise", rewards)
metrics.mean_over_workers(device)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class StepMetrics:
    """The metrics of one worker in one step: values by name, and seconds by phase."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, values: Tensor | float) -> None:
        """Add values of any shape under a name. The step's metric is the mean of all values of that name."""
        self._values[name].append(torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten())

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase. The step's metric seconds_{phase} is their sum."""
        self.seconds[phase] += seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent within the context to a phase."""
        started = clock()
        yield
        self.add_seconds(phase, clock() - started)

    def mean_over_workers(self, device: torch.device) -> dict[str, float]:
        """Return the step's metrics, the same on all workers. All workers call this together, with the same names."""
        local = {name: float(torch.cat(values).mean()) for name, values in self._values.items()}
        local |= {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        names = sorted(local)
        sums = torch.tensor([local[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return dict(zip(names, (sums / dist.get_world_size()).tolist(), strict=True))


def clock() -> float:
    """Return seconds from any start, once this process's GPU, if it uses one, has done all that it was given.

    A GPU works on while Python goes ahead: without waiting, the seconds of a phase would be found in a later one.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def progress_line(step: int, num_steps: int, metrics: dict[str, float]) -> str:
    """Return the line that is printed after each step.

    >>> progress_line(12, 60, {"reward_denoise": 0.05, "loss": 0.65, "grad_norm": 0.4, "seconds_step": 1.5})
    'step 12/60  reward 0.0500  loss 0.6500  gradient norm 0.400  1.50 s/step  ETA 1:12'
    """
    reward = next(metrics[name] for name in ("reward_denoise", "reward_invert", "reward") if name in metrics)
    minutes, seconds = divmod(round((num_steps - step) * metrics["seconds_step"]), 60)
    norm = f"gradient norm {metrics['grad_norm']:.3f}" if "grad_norm" in metrics else "update skipped"
    return (
        f"step {step}/{num_steps}  reward {reward:.4f}  loss {metrics['loss']:.4f}  {norm}  "
        f"{metrics['seconds_step']:.2f} s/step  ETA {minutes}:{seconds:02d}"
    )
