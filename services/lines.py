"""Read a text file as people write it: lines end in LF, CRLF or CR and nowhere else; a byte order mark is no text."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file with each end of a line as \\n. Raise OSError or UnicodeDecodeError."""
    return path.read_text(encoding="utf-8-sig")  # Python's universal newlines are these three


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends. Raise OSError or UnicodeDecodeError.

    str.splitlines would also split at U+2028, U+0085 and other characters that may stand in a prompt.
    """
    return read_text(path).removesuffix("\n").split("\n")
