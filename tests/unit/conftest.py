"""One tiny FLUX for all unit tests: built once, never changed by a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny_flux import make_tiny_flux
from trainer.model.policy import Policy

settings.register_profile("patient", deadline=None)  # a busy machine takes its time; only wrong results fail
settings.load_profile("patient")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux(flux_folder: Path) -> Policy:
    return Policy.load(str(flux_folder), torch.float32)
