"""`srpo plan` and the plan that a run begins with: what they print, refuse and advise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from services.config.run import RunConfig, load_run_config
from trainer.plan import here
from trainer.plan.__main__ import main
from trainer.plan.accelerators import GIB, accelerator
from trainer.plan.advice import advice
from trainer.plan.checkpoint_configs import PlanError
from trainer.plan.here import plan_of
from trainer.plan.seconds import cost
from trainer.runtime.planning import require_fit

RUNS = Path(__file__).resolve().parents[4] / "deploy" / "runs"
FLUX, TINY = RUNS / "flux1_dev_srpo.yaml", RUNS / "tiny_srpo.yaml"

SMALL = ("engine.num_workers=4", "engine.zero_stage=2")  # too few GPUs of 80 GB


def flux(*changes: str) -> RunConfig:
    return load_run_config(FLUX, changes)


def test_a_plan_has_memory_time_disk_and_the_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FLUX), "--accelerator", "h100", "--mfu", "0.3"]) == 0
    printed = capsys.readouterr().out
    for part in ("it fits", "| moments |", "| gradients |", "reward exchange", "GPU-hours", "MFU 0.3", "checkpoints"):
        assert part in printed
    assert "evaluation.prompts_path prompts/heldout.txt is not here" in printed


def test_what_does_not_fit_gets_advice_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FLUX), "--accelerator", "h100", "--set", SMALL[0], "--set", SMALL[1]]) == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    plan = plan_of(flux(*SMALL), "h100")
    best = advice(plan)[0]
    assert best.fits
    assert best.keys == "finetune.kind lora"
    assert best.needed_bytes < plan.accelerator.memory_bytes  # type: ignore[union-attr]  # it is known
    by_hand = plan_of(flux(*SMALL, "prompts.embeddings_path=encoded"), "h100").needed_bytes
    advised = {each.keys: each.needed_bytes for each in advice(plan)}
    assert advised["prompts.embeddings_path (srpo encode-prompts)"] == by_hand < plan.needed_bytes


def test_more_workers_share_the_state_and_a_gpu_holds_less() -> None:
    few, many = (plan_of(flux(f"engine.num_workers={count}", "engine.zero_stage=2"), "h200") for count in (8, 32))
    assert few.sharded.moments == pytest.approx(4 * many.sharded.moments, rel=1e-6)
    assert few.sharded.moments == pytest.approx(2 * 4 * 11_901_408_320 / 8, rel=1e-6)
    assert few.peak.total_bytes > many.peak.total_bytes


def test_a_step_has_the_flops_of_its_forwards() -> None:
    plan = plan_of(flux(), "h100")
    phases = {each.name: each for each in cost(plan, accelerator("h100"), 0.4).phases}
    rollout, forward = phases["rollout"].flops, phases["branches: forward"].flops
    assert rollout / 25 == pytest.approx(forward / 2)  # 25 steps, two branches
    assert phases["branches: backward"].flops > 3 * forward * 0.9  # the forward once more, and twice its work
    slow, fast = (cost(plan, accelerator("h100"), mfu).step_seconds for mfu in (0.2, 0.4))
    assert fast < slow < 2 * fast + 1e-9  # what travels between GPUs takes as long


def test_checkpointing_of_every_block_needs_less_than_of_every_fourth_and_none() -> None:
    plan = plan_of(flux(), "h100")
    peaks = [replace(plan, run=replace(plan.run, checkpointing=each)).branch.peak_bytes for each in (1, 4, 0)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[1] < peaks[2]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FLUX), "--accelerator", "h1000"]) == 1
    assert "'h1000' is unknown; there are: h100, h200" in capsys.readouterr().err
    assert main([str(FLUX), "--set", "model.path=somebody/else", "--accelerator", "h100"]) == 1
    assert "--configs FOLDER" in capsys.readouterr().err
    assert main([str(FLUX), "--set", "model.height_px=721", "--accelerator", "h100"]) == 1
    assert "model.height_px 721" in capsys.readouterr().err


def test_a_run_begins_with_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    require_fit(load_run_config(TINY))
    printed = capsys.readouterr().out
    assert "plan: the host needs" in printed
    assert "at an assumed MFU of" in printed
    require_fit(flux("model.path=somebody/else"))
    assert "plan: none, model.path somebody/else" in capsys.readouterr().out


def test_a_run_that_cannot_fit_is_refused_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError, match=r"IT DOES NOT FIT.*finetune.kind lora: .*--set engine.must_fit=false"):
        require_fit(flux(*SMALL, "engine.accelerator=h100"))
    require_fit(flux(*SMALL, "engine.accelerator=h100", "engine.must_fit=false"))
    assert "engine.must_fit is false" in capsys.readouterr().out
    monkeypatch.setattr(here, "_memory_bytes", lambda: GIB)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PlanError, match="the host needs"):
        require_fit(load_run_config(TINY))


@pytest.mark.parametrize("run", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_can_be_planned(run: Path) -> None:
    assert plan_of(load_run_config(run), "h200").needed_bytes > 0
