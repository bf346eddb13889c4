"""Put the planner's numbers beside what was measured."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from deploy.gpu_check.sizes import Size


def predicted(size: Size, kind: Literal["full", "lora"], depth: float) -> dict[str, Any] | None:
    """Return what trainer/plan says of a step of this kind, or None if this checkout has no planner."""
    if find_spec("trainer.plan") is None:
        return None
    raise NotImplementedError((size, kind, depth))
