"""Run a reward's network in the precision that its arguments name; float32 pixels go in, float32 comes out.

    dtype: bfloat16                    weights and all between pixels and embedding in bfloat16: least memory, fastest
    dtype: bfloat16, autocast: true    float32 weights; matrix products in bfloat16, norms and softmax in float32

Resizing before the network, and what is computed from an embedding, are float32 always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from reward_server.models.transfer import to_device
from reward_server.models.weights import WeightsArgs

# float16 has no numbers below 6e-8, and a pixel's part in a gradient is often smaller. A power of two loses no digit;
# this one leaves room for gradients up to 64 at any activation, where similarities have some thousandths.
_FLOAT16_GRADIENT_SCALE = 2.0**10


class PrecisionArgs(WeightsArgs):
    """Settings of a reward whose network can run in another dtype than float32."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autocast: bool = False

    @model_validator(mode="after")
    def _check_autocast(self) -> Self:
        if self.autocast and self.dtype == "float32":
            raise ValueError("autocast: true needs dtype bfloat16 or float16, not float32")
        return self

    @property
    def version_suffix(self) -> str:
        if self.dtype == "float32":
            return ""
        return f"+dtype={self.dtype}" + ("+autocast" if self.autocast else "")

    @property
    def gradient_scale(self) -> float:
        return _FLOAT16_GRADIENT_SCALE if self.dtype == "float16" else 1.0


class Precision:
    """Device and dtype of one reward."""

    def __init__(self, args: PrecisionArgs) -> None:
        self.device = torch.device(args.device)
        self.is_float32 = args.dtype == "float32"
        self._dtype: torch.dtype = getattr(torch, args.dtype)
        self._is_autocast = args.autocast

    def place(self, network: nn.Module) -> Any:
        """Move a float32 network to the device, with its weights in their dtype."""
        return network.to(self.device, torch.float32 if self._is_autocast else self._dtype)

    def run(self, network: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Return network(pixels) as float32; in float32 this is the network itself."""
        pixels = to_device(pixels, self.device)
        if self.is_float32:
            return network(pixels)
        if self._is_autocast:
            with torch.autocast(self.device.type, self._dtype):
                return network(pixels).float()
        return network(pixels.to(self._dtype)).float()

    def run_text(self, network: Callable[[], Tensor]) -> Tensor:
        """Return network() as float32, where the network reads tokens, which have no precision."""
        if not self._is_autocast:
            return network().float()
        with torch.autocast(self.device.type, self._dtype):
            return network().float()
