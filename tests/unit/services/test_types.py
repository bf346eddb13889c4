"""Callers of the installed package see its types."""

from __future__ import annotations

import tomllib
from importlib.resources import files

from deploy.settings import ROOT


def test_the_clients_types_are_for_callers_too() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "services" in setuptools["packages"]
    (marker,) = setuptools["package-data"]["services"]
    assert marker == "py.typed"  # PEP 561
    assert files("services").joinpath(marker).is_file()
