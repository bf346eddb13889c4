"""Keep a moving average of the trained weights, in float32, spread over the workers.

    average ← decay · average + (1 − decay) · weights          after each optimizer step, from the first weights on

Parameter i lives, whole, on worker i mod num_workers: a checkpoint of any number of workers can be read by any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FOLDER = "average"


class Average:
    """The average of some parameters. Every method is called on all workers, in the same order."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        read: Callable[[nn.Parameter], Tensor],
        written: Callable[[nn.Parameter, int], AbstractContextManager[None]],
    ) -> None:
        """Begin the average at the parameters' values. All workers take part in `read` and `written`.

        `read` returns a parameter's whole float32 value. Within the context `written(parameter, rank)` the parameter
        is whole; afterwards every worker has what worker `rank` has made of it.
        """
        self._parameters, self._decay, self._read, self._written = parameters, decay, read, written
        values = {name: read(parameter) for name, parameter in parameters.items()}
        self._values = {name: values[name].detach().float().clone() for name in self._own()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the weights."""
        for name, parameter in self._parameters.items():
            value = self._read(parameter)
            if name in self._values:
                self._values[name].lerp_(value.float(), 1 - self._decay)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the parameters hold their average, in their own dtype, within the context."""
        trained = self._put(self._values)
        yield
        self._put(trained)  # but not after an error: the other workers would not take part

    def save(self, folder: Path) -> None:
        """Write this worker's part; the parts share one folder."""
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        save_file(self._values, folder / _FOLDER / f"{dist.get_rank()}.safetensors")

    def load(self, folder: Path) -> None:
        """Load what `save` wrote on any number of workers. Raise ValueError if a parameter is missing."""
        wanted = set(self._values)
        for file in sorted((folder / _FOLDER).glob("*.safetensors")):
            with safe_open(file, framework="pt") as part:
                for name in wanted & set(part.keys()):
                    self._values[name].copy_(part.get_tensor(name))
                wanted -= set(part.keys())
        if wanted:
            raise ValueError(f"the checkpoint {folder} has no average of {sorted(wanted)[0]}: was it made without ema?")

    def _own(self) -> list[str]:
        return list(self._parameters)[dist.get_rank() :: dist.get_world_size()]

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let the parameters hold these values. Return this worker's part of what they held."""
        held = {}
        for index, (name, parameter) in enumerate(self._parameters.items()):
            with self._written(parameter, index % dist.get_world_size()):
                if name in values:
                    held[name] = parameter.detach().clone()
                    parameter.data.copy_(values[name])
        return held


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """Read the average of all parameters in a checkpoint, by name; empty for a run without one."""
    weights: dict[str, Tensor] = {}
    for file in sorted((folder / _FOLDER).glob("*.safetensors")):
        weights |= load_file(file)
    return weights
