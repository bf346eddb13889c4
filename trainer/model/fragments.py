"""Keep a training state as fragments in files: each worker writes its own, any number of workers reads what it needs.

    Fragments(num_updates, shapes, ranges, values).save(folder / "0.safetensors")  # on each worker
    with open_fragments(files) as state:
        exp_avg = state.read("exp_avg", "proj_out.weight", range(512, 1024))

A fragment is a range of a flattened parameter: its float32 weights, AdamW's two moments and, if the run has one, the
moving average. The files of all workers hold each trained parameter exactly once. Nothing in them is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.model.tensor_file import FilePlace, TensorFile, open_tensors

WEIGHTS, AVERAGE = "weights", "average"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW names them
_HEADER, _FORMAT = "fragments", 1

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Fragments:
    """One worker's fragments, in host memory.

    shapes: of all trained parameters, by name. ranges: this worker's, of the parameters of which it has a part.
    values: by kind (weights, exp_avg, exp_avg_sq, average) and parameter, 1-D float32. Before the first update there
    are no moments.
    """

    num_updates: int
    shapes: Shapes
    ranges: Mapping[str, range]
    values: Mapping[str, Mapping[str, Tensor]]

    def save(self, path: Path) -> None:
        """Write one safetensors file. Raise OSError if it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": _FORMAT,
            "num_updates": self.num_updates,
            "kinds": list(self.values),
            "shapes": self.shapes,
            "ranges": {name: (each.start, each.stop) for name, each in self.ranges.items()},
        }
        tensors = {f"{kind}/{name}": value for kind, values in self.values.items() for name, value in values.items()}
        try:
            save_file(tensors, path, metadata={_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class SavedState:
    """A training state in the files of all workers that wrote it. See Fragments for the words."""

    num_updates: int
    kinds: frozenset[str]
    shapes: Shapes
    _places: Mapping[str, Sequence[tuple[range, TensorFile]]]

    def read(self, kind: str, name: str, wanted: range) -> Tensor:
        """Return the numbers `wanted` of a flattened parameter, (len(wanted),) float32, and read no others."""
        pieces = [torch.empty(0)]
        for part, file in self._places[name]:
            start, stop = max(part.start, wanted.start), min(part.stop, wanted.stop)
            if start < stop:
                pieces.append(file.read(f"{kind}/{name}", range(start - part.start, stop - part.start)))
        return torch.cat(pieces)

    def weight(self, name: str) -> Tensor:
        """Return a trained weight whole, float32: its average if the run has one."""
        kind = AVERAGE if AVERAGE in self.kinds else WEIGHTS
        shape = self.shapes[name]
        return self.read(kind, name, range(math.prod(shape))).view(shape)

    def require(self, shapes: Shapes, has_average: bool) -> None:
        """Raise ValueError, with a parameter's name, if this is no state of a run that trains parameters `shapes`."""
        for name in shapes.keys() | self.shapes.keys():
            ours, theirs = shapes.get(name), self.shapes.get(name)
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint has {_described(theirs)} {name}, the run trains {_described(ours)}: was it made "
                    "with another model.path, finetune.kind, rank or target_modules?"
                )
        if has_average and AVERAGE not in self.kinds:
            raise ValueError(f"the checkpoint has no average of {next(iter(shapes))}: was it made without ema?")


def _described(shape: tuple[int, ...] | None) -> str:
    return "no" if shape is None else "×".join(map(str, shape))


@contextmanager
def open_fragments(files: Sequence[FilePlace]) -> Iterator[SavedState]:
    """Open the files of all workers. Raise ValueError if one cannot be read, or if together they are not one state.

    The message names the file, or the parameter of which a part is missing.
    """
    if not files:
        raise ValueError("there is no file of a training state")
    with ExitStack() as stack:
        opened = [_open(file, stack) for file in files]
        first = opened[0][0]
        places: dict[str, list[tuple[range, TensorFile]]] = {name: [] for name in first["shapes"]}
        for path, (header, file) in zip(files, opened, strict=True):
            for key in ("num_updates", "kinds", "shapes"):
                if header[key] != first[key]:
                    raise ValueError(f"{path} and {files[0]} are of different checkpoints: their {key} differ")
            for name, (start, stop) in header["ranges"].items():
                places[name].append((range(start, stop), file))
        shapes = {name: tuple(shape) for name, shape in first["shapes"].items()}
        for name, shape in shapes.items():
            places[name].sort(key=lambda place: place[0].start)
            _require_whole(name, [part for part, _ in places[name]], math.prod(shape))
        yield SavedState(first["num_updates"], frozenset(first["kinds"]), shapes, places)


def checkpoint_weights(files: Sequence[FilePlace]) -> dict[str, Tensor]:
    """Return the trained weights whole, float32: their average if the run has one. Raise as open_fragments does."""
    with open_fragments(files) as state:
        return {name: state.weight(name) for name in state.shapes}


def _open(place: FilePlace, stack: ExitStack) -> tuple[dict[str, Any], TensorFile]:
    file = stack.enter_context(open_tensors(place))
    header = json.loads(file.metadata.get(_HEADER, "{}"))
    if header.get("format") != _FORMAT:
        raise ValueError(f"{place} holds no training state of format {_FORMAT}")
    return header, file


def _require_whole(name: str, parts: Sequence[range], length: int) -> None:
    """Raise ValueError unless the parts, sorted, cover numbers 0 to length once."""
    end = 0
    for part in (*parts, range(length, length)):
        if part.start > end:
            raise ValueError(
                f"the checkpoint lacks numbers {end} to {part.start - 1} of {name}: the file of a worker is missing"
            )
        if part.start < end:
            raise ValueError(
                f"the checkpoint has numbers {part.start} to {end - 1} of {name} twice: "
                "its files are of different checkpoints"
            )
        end = part.stop
