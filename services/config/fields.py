"""What every section of a run file is made of: the base class, the types of its values, and how a mistake is reported.

A string below a field is its meaning: `make keys` writes it into KEYS.md or EVALUATION_KEYS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Frozen(BaseModel):
    """A section of a run file. It cannot be changed, refuses unknown keys and holds finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Schedule(Frozen):
    """A number for each training level, of any sign."""

    kind: Literal["constant", "linear", "cosine"] = "linear"
    """How the number goes from `start` to `end`. `cosine` leaves `start` and reaches `end` slowly; `constant` has a
    `start` only."""

    start: float
    """The number at the least noisy level."""

    end: float | None = None
    """The number at the noisiest level."""

    @model_validator(mode="after")
    def _has_an_end_unless_constant(self) -> Schedule:
        if (self.end is None) != (self.kind == "constant"):
            raise ValueError(f"a {self.kind} schedule {'needs an' if self.end is None else 'has no'} end")
        return self


def describe_mistake(item: Mapping[str, Any], shorten: Callable[[object], str] = repr) -> str:
    """Return "key: what is wrong (got value)" for one error of a ValidationError. `shorten` prints the value."""
    place = ".".join(map(str, item["loc"]))
    wrong = "unknown key" if item["type"] == "extra_forbidden" else str(item["msg"]).removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict) else f" (got {shorten(item['input'])})"  # a section is in the message
    return (f"{place}: " if place else "") + wrong + got


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under dotted keys.

    >>> flatten({"seed": 0, "engine": {"zero_stage": 2}})
    {'seed': 0, 'engine.zero_stage': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}  # rewards.0.name
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
