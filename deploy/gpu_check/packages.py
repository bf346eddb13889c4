"""Unpack the packages that travel along (wheels.py collected them), on a machine that has Python and torch only."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

ARCHIVE = "packages.tar.xz"
VECTORS = "reference"  # the reference vectors' folder beside it
_DIGITS = 12


class PackagesError(ValueError):
    """The packages cannot be used; the text names the file and the cure."""


def unpack(folder: Path) -> Path:
    """Return the folder to put on PYTHONPATH, unpacked from FOLDER/packages.tar.xz unless it was before."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise PackagesError(
            f"there is no {archive}: run `make gpu-wheels` where there is a network, and bring it along"
        )
    site = folder / f"site-{hashlib.sha256(archive.read_bytes()).hexdigest()[:_DIGITS]}"
    if not site.is_dir():
        part = site.with_suffix(".part")
        with tarfile.open(archive) as packed:
            packed.extractall(part, filter="data")
        part.rename(site)
    return site
