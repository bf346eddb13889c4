"""Prompts are read alike from every kind of file; what cannot be read is named with file, line or row, and value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.prompt_files import LocatedPrompt, PromptsError, load_prompts, locate_prompts

# the four files of hpsv2's benchmark, as it keeps them
STYLES = ("anime", "concept-art", "paintings", "photo")


def write_json_lines(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_a_text_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffgrinning face\n\n  piñata \r\nred heart".encode())
    assert locate_prompts(path, "prompt") == [
        LocatedPrompt("grinning face", f"{path}, line 1"),
        LocatedPrompt("piñata", f"{path}, line 3"),
        LocatedPrompt("red heart", f"{path}, line 4"),
    ]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_breaks_end_a_prompt(inside: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"red{inside}heart\rkey\r\n\ntulip\n".encode())
    assert locate_prompts(path, "prompt") == [
        LocatedPrompt(f"red{inside}heart", f"{path}, line 1"),
        LocatedPrompt("key", f"{path}, line 2"),
        LocatedPrompt("tulip", f"{path}, line 4"),
    ]


# what is put into a file comes out of it, with the spaces around it taken off
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5))
def test_json_lines_and_parquet_hold_any_text(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    folder, expected = tmp_path_factory.mktemp("prompts"), tuple(prompt.strip() for prompt in prompts)
    lines = write_json_lines(folder / "a.jsonl", [{"id": 1, "caption": prompt} for prompt in prompts])
    table = write_parquet(folder / "a.parquet", caption=prompts, id=[1] * len(prompts))
    assert load_prompts(lines, "caption") == load_prompts(table, "caption") == expected


def test_places_count_lines_and_rows_from_one(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", write_parquet(tmp_path / "a.parquet", prompt=["key", "tulip"])
    lines.write_text('{"prompt": "key"}\n\n{"prompt": "tulip"}\n', encoding="utf-8")
    assert [each.place for each in locate_prompts(lines, "prompt")] == [f"{lines}, line 1", f"{lines}, line 3"]
    assert [each.place for each in locate_prompts(table, "prompt")] == [f"{table}, row 1", f"{table}, row 2"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", None, "cannot read"),
        ("a.txt", b" \n\n", "is empty: give it one prompt a line"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.csv", b"red heart", r"must end in \.txt, \.jsonl, \.parquet; or give hpdv2:all"),
        ("hpdv2:photos", b"", "or give hpdv2:all or hpdv2:{anime,concept-art,paintings,photo}"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", b'{"prompt": "key"}\n{"prompt": ', r"a\.jsonl, line 2 is not JSON: .* at character 12"),
        ("a.jsonl", b'"key"', r"a\.jsonl, line 1 is not an object such as {'prompt': 'red heart'}: 'key'"),
        ("a.jsonl", b'{"text": "key", "id": 1}', r"line 1 has no 'prompt' \(prompts\.column\); it has 'text', 'id'"),
        ("a.jsonl", b'{"prompt": " "}', r"line 1: 'prompt' is empty: ' '"),
        ("a.jsonl", b'{"prompt": 7}', r"line 1: 'prompt' is not text but int: 7"),
        ("a.parquet", b"red heart", r"a\.parquet is not a readable parquet file"),
    ],
)
def test_an_unusable_file_is_named_with_place_and_value(
    tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptsError, match=problem) as caught:
        load_prompts(path, "prompt")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": ["key"], "id": [1]}, r"has no column 'prompt' \(prompts\.column\); it has text, id"),
        ({"prompt": ["key", None]}, "row 2: 'prompt' is not text but NoneType: None"),
        ({"prompt": ["key", "tulip", ""]}, "row 3: 'prompt' is empty: ''"),
        ({"prompt": [1.5]}, r"row 1: 'prompt' is not text but float: 1\.5"),
        ({"prompt": pa.array([], pa.string())}, "is empty"),
    ],
)
def test_an_unusable_table_is_named_with_row_and_value(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(PromptsError, match=problem) as caught:
        load_prompts(path, "prompt")
    assert str(path) in str(caught.value)


def read_benchmark(style: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because hpsv2 and the hub's client read their folders when they are imported."""
    program = f"from trainer.data.prompt_files import *\ntry:\n  print(load_prompts('hpdv2:{style}', 'text'))\n"
    program += "except PromptsError as error:\n  print(error)"
    environment = {"HPS_ROOT": str(folder / "hpsv2"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)


def test_the_benchmark_is_read_as_hpsv2_keeps_it_and_its_absence_is_named(tmp_path: Path) -> None:
    kept = tmp_path / "hpsv2" / "datasets" / "benchmark"
    kept.mkdir(parents=True)
    for style in STYLES:  # links into the hub's cache
        blob = tmp_path / f"{style}-blob"
        blob.write_text(json.dumps([f"{style} one", f"{style} two"]), encoding="utf-8")
        (kept / f"{style}.json").symlink_to(blob)
    assert read_benchmark("photo", tmp_path).stdout == "('photo one', 'photo two')\n"
    together = tuple(f"{style} {number}" for style in STYLES for number in ("one", "two"))
    assert read_benchmark("all", tmp_path).stdout == f"{together}\n"
    (kept / "paintings.json").unlink()
    (line,) = read_benchmark("paintings", tmp_path).stdout.splitlines()
    for part in ("hpdv2:paintings", str(kept / "paintings.json"), "zhwang/HPDv2", "HPS_ROOT"):
        assert part in line


def test_the_benchmark_is_what_hpsv2_fetches_from_the_hub(tmp_path: Path) -> None:
    """Against the hub's own cache, laid out as its client does; hpsv2 makes the links."""
    snapshot = tmp_path / "hub" / "hub" / "datasets--zhwang--HPDv2" / "snapshots" / ("0" * 40) / "benchmark"
    snapshot.mkdir(parents=True)
    (snapshot.parents[2] / "refs").mkdir()
    (snapshot.parents[2] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for style in STYLES:
        (snapshot / f"{style}.json").write_text(json.dumps([f"{style} one"]), encoding="utf-8")
    assert read_benchmark("anime", tmp_path).stdout == "('anime one',)\n"
    assert (tmp_path / "hpsv2" / "datasets" / "benchmark" / "photo.json").is_symlink()
