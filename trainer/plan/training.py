"""Say which parameters of a planned network are trained. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.config.finetune import ends_in


@dataclass(frozen=True, slots=True)
class Training:
    """Which parameters are trained: all, none, or an adapter of `rank` beside the linear layers that end in `targets`.

    >>> Training.adapter(16, ["attn.to_q"]).rank_of("transformer_blocks.0.attn.to_q")
    16
    """

    trains_all: bool
    rank: int = 0
    targets: tuple[str, ...] = ()

    @classmethod
    def full(cls) -> Training:
        return cls(trains_all=True)

    @classmethod
    def frozen(cls) -> Training:
        return cls(trains_all=False)

    @classmethod
    def adapter(cls, rank: int, targets: Sequence[str]) -> Training:
        return cls(False, rank, tuple(targets))

    def rank_of(self, layer: str) -> int:
        """Return the rank of a linear layer's adapter, 0 without one."""
        return self.rank if any(ends_in(target, layer) for target in self.targets) else 0
