"""Who may import whom (pyproject.toml): the rules hold, and each kind of breach is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in ("services", "reward_server", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_hold(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("reward_server/scoring/srp.py", "import trainer.flow", "never see each other"),
        ("trainer/flow.py", "import trainer.algorithm.rollout", "this is their order"),
        ("services/config/run.py", "import services.clients.jobs", "commands over clients"),
        ("trainer/train.py", "import mlflow", "every giant has one home"),
        ("services/contract.py", "import torch", "light files"),
    ],
)
def test_a_breach_is_found(copy: Path, file: str, line: str, broken: str) -> None:
    with (copy / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    result = lint_imports(copy)
    assert result.returncode == 1
    assert broken in " ".join(result.stdout.split("Broken contracts")[1].split())


def test_a_new_file_must_be_given_a_place(copy: Path) -> None:
    (copy / "trainer" / "helpers.py").write_text('"""Everything else."""\n', encoding="utf-8")
    result = lint_imports(copy)
    assert result.returncode == 1
    assert "helpers" in result.stdout
