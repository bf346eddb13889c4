"""`make seeds`: its run files differ in seed and name, a changed file is run again, and the table tells each run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.demo import FORWARD, REVERSED
from deploy.seeds import SEEDS, is_made, run_files, table
from deploy.settings import ROOT
from services.config.run import load_run_config
from trainer.evaluation.paired import GAPS


def value(number: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": number, "low": number - spread, "high": number + spread}


def row(run: str, seed: int, **aligned: Any) -> dict[str, Any]:
    numbers = {"truth_subject_similarity": value(0.95), "diversity_prompts": value(4.0), "damage": value(0.6)}
    return {
        "run": run,
        "seed": seed,
        "base": numbers,
        "oracle": numbers | {"diversity_prompts": value(5.0)},
        "aligned": numbers | {name: value(0.7) for name in GAPS} | aligned,
        "guard": {"exported_step": 20, "stopped_by": None},
        "subject_difference": value(0.02, 0.01),
    }


def test_run_files_are_the_demos_but_for_seed_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    configs = [load_run_config(file) for file in run_files(tmp_path)]
    assert len({config.name for config in configs}) == len(configs) == 2 * len(SEEDS)
    for config in configs:
        original = load_run_config(FORWARD if config.control_words.positive == "3D" else REVERSED)
        assert config == original.model_copy(update={"name": config.name, "seed": config.seed})


def test_a_run_is_made_once_its_comparison_lies_beside_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = run_files(tmp_path / "files")[0]
    assert not is_made(file)
    made = tmp_path / "outputs" / load_run_config(file).name / "comparison" / file.name
    made.parent.mkdir(parents=True)
    made.write_bytes(file.read_bytes())
    assert is_made(file)
    file.write_text(file.read_text(encoding="utf-8").replace("num_steps: 20", "num_steps: 21"), encoding="utf-8")
    assert not is_made(file)


def test_the_table_has_a_line_for_each_run_with_intervals() -> None:
    missing = dict.fromkeys(GAPS[1:])
    rows = [row("Flat | 3D", 1), row("3D | Flat", 2, **missing), row("3D | Flat", 1)]
    lines = table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 3D \\| Flat, 1", "| 3D \\| Flat, 2", "| Flat \\| 3D, 1"]
    assert "| 0.70 (0.60 to 0.80) |" in lines[2]
    assert "| – | – | – |" in lines[3]
    assert "80%" in lines[2]
    assert "0.950 → 0.950 (+0.010 to +0.030)" in lines[2]
