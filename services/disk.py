"""Name a full disk: what could not be written to it, and how much of it is free.

with full_disk_named(folder / "model"):
    transformer.save_pretrained(folder / "model")
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = re.compile(r"No space left on device|Disk quota exceeded")  # what libraries keep of those
_TOO_LITTLE = 2**20  # bytes: torch.save says nothing of the cause


class DiskFullError(OSError):
    """There is no room to write something; the text names it, the bytes that are free and the cure."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.errno = errno.ENOSPC


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise DiskFullError, whatever the library within raises, if there is no room to write `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(_nearest(path)).free
        is_named = getattr(error, "errno", None) in _NUMBERS or _WORDS.search(str(error))
        if not is_named and (isinstance(error, OSError) or free >= _TOO_LITTLE):
            raise
        raise DiskFullError(
            f"no room to write {path}: its disk has {free / 2**20:,.1f} MiB left: free some, then resume the run"
        ) from error


def _nearest(path: Path) -> Path:
    """Return the path itself or the nearest folder above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
