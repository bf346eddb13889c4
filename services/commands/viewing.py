"""`srpo viewing`: read the choices of a blind viewing and count how often the model was chosen.

    srpo viewing outputs/tiny_srpo/comparison/viewing_key.json choices-ann.json choices-bob.json

Shares have 95 % Wilson intervals (Wilson 1927). A pair that was called the same counts half.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.commands.usage import UsageError

_Z = 1.96  # of a 95 % interval

Side = Literal["left", "right"]
_FileT = TypeVar("_FileT", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyPair(_Message):
    """Which side of a pair shows the model."""

    prompt: str
    model: Side


class Key(_Message):
    """viewing_key.json, which `srpo evaluate` writes."""

    viewing: str
    pairs: tuple[KeyPair, ...]


class Choice(_Message):
    """What a viewer chose for a pair; `closer` is null if nothing was chosen."""

    pair: Annotated[int, Field(ge=0)]
    closer: Side | Literal["same"] | None
    broken: tuple[Side, ...]


class Choices(_Message):
    """The file that the page saves."""

    viewing: str
    viewer: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of the pairs that one viewer chose, each as (share, low, high)."""

    viewer: str
    num_pairs: int
    model_closer: tuple[float, float, float]
    model_broken: tuple[float, float, float]
    base_broken: tuple[float, float, float]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo viewing`."""
    parser.add_argument("key", type=Path, metavar="KEY.json", help="viewing_key.json, written by srpo evaluate")
    parser.add_argument("choices", type=Path, nargs="+", metavar="CHOICES.json", help="files that the page has saved")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line in place of a table")
    parser.set_defaults(handler=_viewing)


def _viewing(args: argparse.Namespace) -> int:
    """Print a line for each viewer. Raise UsageError for a file that is not of this viewing."""
    key = _read(Key, args.key)
    results = [count(key, _read(Choices, path), path) for path in args.choices]
    if args.json:
        print("\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results))
        return 0
    print("pairs  model closer        model broken        base broken         viewer")
    for result in results:
        shares = (result.model_closer, result.model_broken, result.base_broken)
        print(f"{result.num_pairs:5}  {'  '.join(_cell(share) for share in shares)}  {result.viewer}")
    return 0


def count(key: Key, choices: Choices, path: Path) -> Result:
    """Return a viewer's shares. Raise UsageError if the choices are of another viewing, or none was made."""
    if choices.viewing != key.viewing:
        raise UsageError(f"{path} is of viewing {choices.viewing}, but the key is of {key.viewing}: give its key")
    if beyond := [choice.pair for choice in choices.choices if choice.pair >= len(key.pairs)]:
        raise UsageError(f"{path} has a choice for pair {beyond[0]}, but the viewing has {len(key.pairs)} pairs")
    made = [choice for choice in choices.choices if choice.closer is not None]
    if not made:
        raise UsageError(f"{path} has no choice: choose a side for some pairs, and save them again")
    sides = [key.pairs[choice.pair].model for choice in made]
    pairs = list(zip(made, sides, strict=True))
    closer = sum(0.5 if choice.closer == "same" else choice.closer == side for choice, side in pairs)
    model_broken = sum(side in choice.broken for choice, side in pairs)
    base_broken = sum(len(choice.broken) for choice in made) - model_broken
    shares = [wilson(number, len(made)) for number in (closer, model_broken, base_broken)]
    return Result(choices.viewer, len(made), *shares)


def wilson(number: float, total: int) -> tuple[float, float, float]:
    """Return share, low and high of a 95 % Wilson score interval (Wilson 1927).

    >>> [round(each, 2) for each in wilson(7, 10)]
    [0.7, 0.4, 0.89]
    """
    share, spread = number / total, _Z**2 / total
    center = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return share, max(0.0, center - half), min(1.0, center + half)


def _read(kind: type[_FileT], path: Path) -> _FileT:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is no {kind.__name__.lower()} of a viewing: {place}: {first['msg']}") from error


def _cell(share: Sequence[float]) -> str:
    return f"{share[0]:4.0%} ({share[1]:4.0%} to {share[2]:4.0%})"
