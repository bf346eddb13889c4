"""Stage: which attention backends, fused optimizers and torch.compile work, and how fast each is beside the plain one.

A transformer of full width and a few blocks stands for the whole: blocks are all alike. ratio: seconds of the plain way
over seconds of this one, above 1 is faster. error: of the output, relative to the plain one's largest number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deploy.gpu_check.meter import Meter, seconds_of
from deploy.gpu_check.random_weights import random_conditioning, random_policy
from deploy.gpu_check.report import Report
from deploy.gpu_check.sizes import Size
from trainer.model.policy import Policy

_DTYPE = torch.bfloat16
_SIGMA, _GUIDANCE = 0.7, 3.5
_PLAIN_BACKEND, _PLAIN_ADAM = "native", "foreach"


def run(size: Size, device: torch.device, report: Report) -> None:
    """Try optimizers and attention backends, then torch.compile, which takes longest."""
    seconds: dict[str, float] = {}
    for name in (_PLAIN_ADAM, "fused", "one by one"):
        with report.attempt(f"AdamW {name}"):
            seconds[name] = adam_seconds(name, size, device)
            ratio = round(seconds[_PLAIN_ADAM] / seconds[name], 3)
            report.add(f"AdamW {name}", {"seconds": seconds[name], "ratio": ratio})
    blocks = dict(zip(("num_layers", "num_single_layers"), size.kernel_blocks, strict=True))
    shallow = replace(size, transformer=size.transformer | blocks)
    policy = random_policy(shallow, _DTYPE, device, checkpointing=False)
    transformer: Any = policy.transformer
    plain = _Comparison(policy, shallow, device)
    for name in size.attention_backends:
        with report.attempt(f"attention {name}"):
            transformer.set_attention_backend(name)
            report.add(f"attention {name}", plain.measured())
    transformer.set_attention_backend(_PLAIN_BACKEND)
    with report.attempt("torch.compile"):
        meter = Meter(device)
        meter.start("first call")
        transformer.compile_repeated_blocks(fullgraph=True, backend=size.compile_backend)
        plain.forward()
        meter.stop()
        report.add("torch.compile", plain.measured() | {"seconds_first_call": meter.phases["first call"]["seconds"]})


class _Comparison:
    """Forward, and forward with backward, of a policy as it is set up now beside what it did at first."""

    def __init__(self, policy: Policy, size: Size, device: torch.device) -> None:
        self._policy, self._size, self._device = policy, size, device
        self._latents = policy.draw_noise([torch.Generator().manual_seed(0)], size.height_px, size.width_px)
        self._conditioning = random_conditioning(size, _DTYPE, device)
        self._sigma = torch.tensor(_SIGMA, device=device)
        self._exact = self.forward()
        self._plain = self._seconds()

    def measured(self) -> dict[str, Any]:
        error = (self.forward().float() - self._exact.float()).abs().max() / self._exact.float().abs().max()
        seconds = self._seconds()
        entry: dict[str, Any] = {"error": float(error)}
        for name, each in seconds.items():
            entry |= {f"{name}_seconds": each, f"{name}_ratio": round(self._plain[name] / each, 3)}
        return entry

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._velocity()

    def _seconds(self) -> dict[str, float]:
        calls: dict[str, Callable[[], object]] = {"forward": self.forward, "backward": self._backward}
        warm_ups, repeats = self._size.num_warm_ups, self._size.num_calls
        return {
            name: seconds_of(call, self._device, num_warm_ups=warm_ups, num_calls=repeats)
            for name, call in calls.items()
        }

    def _backward(self) -> None:
        self._velocity().float().square().mean().backward()
        self._policy.transformer.zero_grad()

    def _velocity(self) -> Tensor:
        size = self._size
        return self._policy.predict_velocity(
            self._latents, self._sigma, self._conditioning, _GUIDANCE, size.height_px, size.width_px
        )


def adam_seconds(kind: str, size: Size, device: torch.device) -> float:
    """Return the seconds of one step of AdamW on float32 weights, of which there are as many as in some layers."""
    side = max(1, round((size.num_adam_parameters / 8) ** 0.5))
    weights = [torch.zeros(side, side, device=device).requires_grad_() for _ in range(8)]
    for each in weights:
        each.grad = torch.ones_like(each)
    adam = torch.optim.AdamW(weights, lr=1e-6, fused=kind == "fused", foreach=kind == "foreach")
    return seconds_of(adam.step, device, num_warm_ups=1, num_calls=size.num_calls)
