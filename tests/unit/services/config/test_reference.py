"""KEYS.md and EVALUATION_KEYS.md, the reference of a run file's keys: current, complete, and of a page each."""

from __future__ import annotations

from pathlib import Path

from services.config.reference import write_reference

FOLDER = Path(__file__).resolve().parents[4] / "services" / "config"


def test_the_reference_is_current() -> None:
    """After a change of the keys: `make keys`."""
    for name, text in write_reference().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


def test_every_key_has_a_meaning() -> None:
    lines = [line for text in write_reference().values() for line in text.splitlines()]
    rows = [line.split(" | ") for line in lines if line.startswith("| `")]
    assert len(rows) > 100
    for key, *_, meaning in rows:
        assert meaning.endswith(". |"), key


def test_every_section_is_on_one_page() -> None:
    headings = [line for text in write_reference().values() for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings))
    for name in ("model", "objective", "engine", "checkpoint", "evaluation", "guard", "comparison", "tracking"):
        assert f"## {name}" in headings
