"""Read prompts from .txt, .jsonl and .parquet files and from the HPDv2 benchmark. The only hpsv2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from services.config.prompts import Benchmark, PromptsPath
from services.lines import read_lines

_BENCHMARK_STYLES = ("anime", "concept-art", "paintings", "photo")
_SHOWN_CHARACTERS = 60


class PromptsError(ValueError):
    """The prompts cannot be used; the text names the file, the place in it, and the cure."""


class LocatedPrompt(NamedTuple):
    """
    >>> LocatedPrompt("red heart", "prompts/train.txt, line 3")
    """

    prompt: str
    place: str


def load_prompts(path: PromptsPath, column: str) -> tuple[str, ...]:
    """Return the prompts in the file's order, stripped of surrounding spaces. Raise PromptsError."""
    return tuple(each.prompt for each in locate_prompts(path, column))


def locate_prompts(path: PromptsPath, column: str) -> list[LocatedPrompt]:
    """Return each prompt with its place. Blank lines are left out; lines and rows are counted from 1.

    `column` is the text's key in .jsonl and its column in .parquet. Raise PromptsError.
    """
    if isinstance(path, str):
        return list(_benchmark(path))
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        benchmarks = f"hpdv2:all or hpdv2:{{{','.join(_BENCHMARK_STYLES)}}}"
        raise PromptsError(f"prompt file {path}: its name must end in {', '.join(readers)}; or give {benchmarks}")
    try:
        prompts = list(readers[path.suffix](path, column))
    except OSError as error:
        raise PromptsError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptsError(f"the prompt file {path} is not UTF-8 text: {error}") from error
    if not prompts:
        raise PromptsError(f"the prompt file {path} is empty: give it one prompt a line or row")
    return prompts


def _text(path: Path, _: str) -> Iterator[LocatedPrompt]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield LocatedPrompt(line.strip(), f"{path}, line {number}")


def _json_lines(path: Path, column: str) -> Iterator[LocatedPrompt]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptsError(f"{place} is not JSON: {error.msg} at character {error.pos + 1}") from error
        if not isinstance(item, dict):
            raise PromptsError(f"{place} is not an object such as {{{column!r}: 'red heart'}}: {_shown(item)}")
        if column not in item:
            raise PromptsError(f"{place} has no {column!r} (prompts.column); it has {', '.join(map(repr, item))}")
        yield LocatedPrompt(_checked(item[column], place, column), place)


def _parquet(path: Path, column: str) -> Iterator[LocatedPrompt]:
    import pyarrow.parquet  # on use, as below: most runs have text files
    from pyarrow.lib import ArrowException

    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if column not in names:
                raise PromptsError(f"{path} has no column {column!r} (prompts.column); it has {', '.join(names)}")
            values = table.read(columns=[column]).column(column).to_pylist()
        except ArrowException as error:
            raise PromptsError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    for number, value in enumerate(values, 1):
        place = f"{path}, row {number}"
        yield LocatedPrompt(_checked(value, place, column), place)


def _benchmark(name: Benchmark) -> Iterator[LocatedPrompt]:
    """Yield HPDv2's benchmark prompts from the folder of hpsv2, which fetches them if they are not there."""
    import hpsv2

    style = name.partition(":")[2]
    folder = Path(hpsv2.root_path) / "datasets" / "benchmark"
    for each in _BENCHMARK_STYLES if style == "all" else (style,):
        file = folder / f"{each}.json"
        try:  # hpsv2 itself would ask the hub every time
            prompts = json.loads(file.read_text("utf-8")) if file.is_file() else hpsv2.benchmark_prompts(each)
        except (OSError, ValueError) as error:
            raise PromptsError(
                f"{name}: {file} cannot be read, nor fetched from the hub's data set zhwang/HPDv2 "
                f"({str(error).splitlines()[0]}): where there is no hub, put its benchmark/{each}.json there "
                "(HPS_ROOT changes the folder), or give a file of your own"
            ) from error
        if not isinstance(prompts, list) or not prompts:
            raise PromptsError(f"{name}: {file} is not a list of prompts: delete it, so that hpsv2 fetches it anew")
        for number, prompt in enumerate(prompts, 1):
            place = f"{file}, prompt {number}"
            yield LocatedPrompt(_checked(prompt, place, "prompt"), place)


def _checked(value: object, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise PromptsError(f"{place}: {column!r} is not text but {type(value).__name__}: {_shown(value)}")
    if not value.strip():
        raise PromptsError(f"{place}: {column!r} is empty: {_shown(value)}")
    return value.strip()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
