"""Out of finished runs: method.json, the tables in README and LOG, and the picture."""

from __future__ import annotations


def write_report(bench: object, *, is_committed: bool) -> None:
    raise NotImplementedError
