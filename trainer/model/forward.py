"""Let a FLUX transformer see sigma and guidance unrounded, and compute in another dtype than its weights'.

    forward = Forward(transformer)
    with forward.given(timesteps, guidance, torch.bfloat16, "cuda"):
        (velocity,) = transformer(...)  # or DeepSpeed's wrapper of it

A bfloat16 transformer rounds both numbers before it embeds them: 1000·sigma to a multiple of 4, guidance 3500 to 3504.
Their embeddings turn by up to a radian for each unit, so the velocity would be that of another sigma.

A float32 transformer computes in bfloat16 under autocast, which casts a layer's weights when they are used. So no copy
of the weights is kept, and it works in every ZeRO stage. Hooks enter it inside of the transformer, because DeepSpeed's
wrapper turns off what is on outside of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Forward:
    """Hooks of one transformer, which do nothing outside of `given`."""

    def __init__(self, transformer: nn.Module) -> None:
        self._numbers: tuple[Tensor, ...] = ()
        self._autocast: AbstractContextManager[Any] | None = None
        transformer.register_forward_pre_hook(self._enter)
        transformer.register_forward_hook(self._leave, always_call=True)
        transformer.get_submodule("time_text_embed").register_forward_pre_hook(self._replace)

    @contextmanager
    def given(
        self, timesteps: Tensor, guidance: Tensor | None, dtype: torch.dtype | None, device_type: str
    ) -> Iterator[None]:
        """Let forward embed these timesteps and guidance, both 1000-fold (batch,), and compute in `dtype` (None: its
        own)."""
        self._numbers = (timesteps,) if guidance is None else (timesteps, guidance)
        if dtype is not None:
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of autocast's norms
            self._autocast = torch.autocast(device_type, dtype, cache_enabled=False)  # a cache would hold all weights
        try:
            yield
        finally:
            self._numbers, self._autocast = (), None

    def _enter(self, *_: Any) -> None:
        if self._autocast is not None:
            self._autocast.__enter__()

    def _leave(self, *_: Any) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(None, None, None)

    def _replace(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*self._numbers, *arguments[len(self._numbers) :])
