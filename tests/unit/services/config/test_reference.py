"""KEYS.md, the reference of a run file's keys: current, complete, and quick to make."""

from __future__ import annotations

from pathlib import Path

from services.config.reference import write_reference

KEYS = Path(__file__).resolve().parents[4] / "services" / "config" / "KEYS.md"


def test_the_reference_is_current() -> None:
    """After a change of the keys: `make keys`."""
    assert KEYS.read_text(encoding="utf-8") == write_reference()


def test_every_key_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in write_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    for key, *_, meaning in rows:
        assert meaning.endswith(". |"), key
