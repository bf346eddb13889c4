from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.tiny.recipe.data import RecipeError, fetch
from deploy.tiny.recipe.stages import Stage, run


def writes(text: str, calls: list[str]) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        calls.append(text)
        out.mkdir()
        (out / "weights").write_text(text, encoding="utf-8")

    return make


def fails(out: Path) -> None:
    out.mkdir()
    (out / "weights").write_text("half of", encoding="utf-8")
    raise KeyboardInterrupt


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """What a clean checkout has where a stage is to write."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("released", encoding="utf-8")
    (folder / "leftover").touch()
    return folder


def weights(folder: Path) -> str:
    return (folder / "weights").read_text(encoding="utf-8")


def test_a_stage_is_made_where_its_output_was_released_and_then_no_more(released: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    for text in ("first", "second"):
        run({"model": Stage(writes(text, calls), released)}, tmp_path / "build")
    assert calls == ["first"]
    assert weights(released) == "first"
    assert not (released / "leftover").exists()
    (tmp_path / "build" / "model.done").unlink()
    run({"model": Stage(writes("anew", calls), released)}, tmp_path / "build")
    assert weights(released) == "anew"


def test_an_interrupted_stage_leaves_its_output_and_is_made_again(released: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run({"model": Stage(fails, released)}, tmp_path / "build")
    assert weights(released) == "released"
    run({"model": Stage(writes("whole", []), released)}, tmp_path / "build")
    assert weights(released) == "whole"


def test_a_stage_without_an_output_is_made_every_time(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        run({"measure": Stage(lambda _: calls.append("measured"))}, tmp_path)
    assert calls == ["measured"] * 2


def test_drawings_that_cannot_be_fetched_without_npm_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=r"emojibase-data@.* comes from npm, which is not installed"):
        fetch(tmp_path / "npm")
