"""Keep a moving average of the trained weights, in float32: each worker keeps that of its own part.

    average ← decay · average + (1 − decay) · weights          after each optimizer step, from the first weights on

Only drawing and export need it whole: `in_force`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.model.shards import Shards


class Average:
    """The average of this worker's part of the weights. Only `in_force` needs all workers."""

    def __init__(self, shards: Shards, decay: float) -> None:
        """Begin the average at the weights as they are."""
        self._shards, self._decay = shards, decay
        self.values = {name: weights.clone() for name, weights in shards.weights().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the weights."""
        for name, weights in self._shards.weights().items():
            self.values[name].lerp_(weights, 1 - self._decay)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the policy compute with the average within the context. All workers enter and leave it together."""
        shards = self._shards
        with shards.lock, torch.no_grad():
            shards.show(self.values)
        yield
        with shards.lock, torch.no_grad():  # but not after an error: the other workers would not take part
            shards.show()
