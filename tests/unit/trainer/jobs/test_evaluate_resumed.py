"""An evaluation that was stopped goes on where it was, and a later one makes only what a change concerns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny_flux import changed_copy
from trainer.jobs.evaluate import main

ROOT = Path(__file__).resolve().parents[4]


def kept_chunks(folder: Path, source: str) -> dict[str, int]:
    """When each chunk below a comparison's folder was written, of those that depend on `source`: drawn on a seed,
    measured on rewards."""
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for kept in folder.glob("kept/*/kept.json")
        if source in json.loads(kept.read_text(encoding="utf-8"))
        for file in kept.parent.glob("*.safetensors")
    }


def test_a_killed_evaluation_goes_on_where_it_was_and_ends_as_if_it_had_not_been(
    run_file: Path,
    flux_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    changed_copy(flux_folder, tmp_path / "other")
    kill_after(5, run_file)  # of nine chunks: eight pictures in threes, of three policies
    folder = tmp_path / "outputs/tiny/comparison"
    before = {source: kept_chunks(folder, source) for source in ("seed", "rewards")}
    assert 5 <= len(before["rewards"]) < 9
    assert not (folder / "numbers.json").exists()
    capsys.readouterr()
    assert main([str(run_file), f"same={flux_folder}", "other"]) == 0
    output = capsys.readouterr().out
    assert "base: 8 of 8 pictures are drawn already, 8 are measured" in output
    assert output.count("is kept") == 9 - len(before["rewards"])
    for source, chunks in before.items():
        after = kept_chunks(folder, source)
        assert chunks.items() <= after.items(), "what was made is not made again"
        assert len(after) == 9
    whole = yaml.safe_load(run_file.read_text(encoding="utf-8")) | {"name": "whole"}
    run_file.write_text(yaml.safe_dump(whole), encoding="utf-8")
    assert main([str(run_file), f"same={flux_folder}", "other"]) == 0
    assert "drawn already" not in capsys.readouterr().out
    resumed, undisturbed = (
        json.loads((tmp_path / "outputs" / name / "comparison/numbers.json").read_text()) for name in ("tiny", "whole")
    )
    assert list(resumed) == list(undisturbed) == ["base", "same", "other"]
    for policy, numbers in undisturbed.items():
        for name, number in numbers.items():
            for kind, ends in number.items():
                assert resumed[policy][name][kind] == pytest.approx(ends, rel=1e-6, abs=1e-6), (policy, name)


def kill_after(num_chunks: int, run_file: Path) -> None:
    """Start the evaluation in a process of its own, and kill it when it has kept so many chunks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "trainer.jobs.evaluate", str(run_file), f"same={flux_of(run_file)}", "other"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kept = (line for line in process.stdout if line.endswith("is kept\n"))
        assert len(list(islice(kept, num_chunks))) == num_chunks
        process.kill()
    assert process.returncode == -signal.SIGKILL


def flux_of(run_file: Path) -> str:
    return str(yaml.safe_load(run_file.read_text(encoding="utf-8"))["model"]["path"])


def test_a_change_draws_or_measures_again_what_depends_on_it_and_nothing_else(
    run_file: Path,
    flux_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    other, folder = changed_copy(flux_folder, tmp_path / "other"), tmp_path / "outputs/tiny/comparison"
    run = yaml.safe_load(run_file.read_text(encoding="utf-8"))

    def made(changes: dict[str, Any]) -> tuple[int, int]:
        """How many chunks are drawn and measured under these changes that were not before."""
        before = [kept_chunks(folder, source) for source in ("seed", "rewards")]
        run_file.write_text(yaml.safe_dump(run | changes), encoding="utf-8")
        assert main([str(run_file), str(other)]) == 0
        after = [kept_chunks(folder, source) for source in ("seed", "rewards")]
        assert all(old.items() <= new.items() for old, new in zip(before, after, strict=True))
        return len(after[0]) - len(before[0]), len(after[1]) - len(before[1])

    assert made({}) == (6, 6)
    numbers = (folder / "numbers.json").read_bytes()
    capsys.readouterr()
    assert made({}) == (0, 0)
    assert (folder / "numbers.json").read_bytes() == numbers
    assert "other: 8 of 8 pictures are drawn already, 8 are measured" in capsys.readouterr().out
    assert made({"comparison": run["comparison"] | {"num_draws": 20}}) == (0, 0)
    assert made({"control_words": {"positive": "Oil", "negative": "Flat"}}) == (0, 6)
    assert (folder / "numbers.json").read_bytes() != numbers
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert made({}) == (3, 3)
    assert made({"seed": 1}) == (6, 6)
