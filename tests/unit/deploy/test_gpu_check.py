"""Every stage of `make gpu-check` on this CPU at tiny sizes, its limits and reports, and what travels along."""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.gpu_check.half_depth import extrapolated, fitting_depths
from deploy.gpu_check.meter import Meter
from deploy.gpu_check.packages import ARCHIVE, PackagesError, unpack
from deploy.gpu_check.prediction import NO_PLANNER, Prediction
from deploy.gpu_check.random_weights import at_depth, num_parameters, random_policy
from deploy.gpu_check.report import Report
from deploy.gpu_check.sizes import FULL, TINY
from deploy.gpu_check.stage import run_stage
from deploy.gpu_check.stages import LIMITS_S, Deadline, is_good, run_all
from deploy.gpu_check.training import OPTIMIZER, MasterWeights
from deploy.gpu_check.wheels import MAX_BYTES, PACKAGES, WheelsError, pack, pinned, require_small
from deploy.gpu_check.wheels import main as collect_wheels
from deploy.settings import ROOT

CPU = torch.device("cpu")
PHASES = {"rollout", "forward", "reward", "backward", "update"}


def results(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage writes on this machine, all checks kept."""
    run_stage(stage, TINY, CPU, folder / f"{stage}.json", [])
    tree = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    assert is_good(tree), tree
    found: dict[str, Any] = tree["results"]
    return found


def assert_planned(plan: Any) -> None:
    """That a step stands beside the plan's numbers, or says that this checkout has no planner."""
    if find_spec("trainer.plan") is None:
        assert plan == NO_PLANNER
    else:
        assert plan["phases"].keys() == PHASES
        assert all(row["planned_gib"] > 0 for name, row in plan["phases"].items() if name != "reward")
        assert all(row["seconds_ratio"] > 0 for row in plan["phases"].values())


def test_the_embedded_stage_checks_loss_and_gradient(tmp_path: Path) -> None:
    run_stage("embedded", TINY, CPU, tmp_path / "embedded.json", [])
    tree = json.loads((tmp_path / "embedded.json").read_text(encoding="utf-8"))
    values = {check["name"]: check["value"] for check in tree["checks"]}
    assert values.keys() >= {"float32: rollout", "float32: loss", "float32: gradient"}
    assert 0.99 <= values["bfloat16: cosine of gradients"] < 1
    assert is_good(tree)


def test_the_full_size_stage_measures_each_phase_of_a_step(tmp_path: Path) -> None:
    found = results(tmp_path, "full_size")
    for name in ("lora_step", "lora_step_without_checkpointing"):
        assert found[name]["phases"].keys() == PHASES
        assert found[name]["phases"]["backward"]["calls"] == 2
        assert found[name]["outcome"]["grad_norm"] > 0
        assert_planned(found[name]["plan"])
    assert 0 < found["lora_step"]["trained_parameters"] < found["transformer_parameters"]


def test_the_half_depth_stage_continues_the_line_to_the_whole_depth(tmp_path: Path) -> None:
    found = results(tmp_path, "half_depth")
    assert found["depth_1"]["parameters"] == num_parameters(TINY.transformer) > found["depth_0.5"]["parameters"]
    assert_planned(found["depth_1"]["plan"])
    for name, entry in found["whole_depth"]["phases"].items():
        assert entry["seconds"] == pytest.approx(found["depth_1"]["phases"][name]["seconds"], abs=1e-3)


def test_the_reward_stage_compares_precisions_with_float32(tmp_path: Path) -> None:
    found = results(tmp_path, "reward_speed")
    assert found["float32"]["errors"]["largest_gradient_error"] == 0
    assert 0 < found["bfloat16 autocast"]["errors"]["largest_gradient_error"] < 0.1
    speeds = found["float16 autocast"]["speeds"]
    assert [each["batch"] for each in speeds] == list(TINY.reward_batches)
    assert all(each["scorer_gradient_images_per_second"] > 0 for each in speeds)


def test_the_kernels_stage_notes_what_does_not_work_here(tmp_path: Path) -> None:
    found = results(tmp_path, "kernels")
    assert found["attention native"]["error"] == 0
    assert 0 < found["attention _native_math"]["error"] < 0.1
    assert "RuntimeError" in found["attention _native_cudnn"]["error"]
    assert found["torch.compile"]["error"] < 0.1
    assert found["AdamW fused"]["ratio"] > 0


def test_a_stage_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_stage("reward_speed", replace(TINY, architecture="absent"), CPU, tmp_path / "reward_speed.json", [])
    tree = json.loads((tmp_path / "reward_speed.json").read_text(encoding="utf-8"))
    assert tree["status"] == "failed"
    assert "absent" in tree["error"]
    assert tree["results"]["machine"]["card"] == "none, on cpu"  # what it had by then


def script(path: Path, end: str) -> list[str]:
    """A stage's process that writes a result and then does `end`."""
    tree = '{"stage": "x", "status": "running", "results": {"first": 1}, "checks": []}'
    return [sys.executable, "-c", f"import pathlib, time; pathlib.Path({str(path)!r}).write_text({tree!r}); {end}"]


def test_a_stage_that_is_cut_keeps_its_results_and_others_still_run(tmp_path: Path) -> None:
    names = ["hangs", "dies", "late"]
    commands = {
        "hangs": script(tmp_path / "hangs.json", "time.sleep(60)"),
        "dies": script(tmp_path / "dies.json", "raise SystemExit(3)"),
        "late": ["/absent"],
    }
    deadline = Deadline(time.monotonic() + 60)
    limits = {"hangs": 2.0, "dies": 30.0, "late": 0.5}
    found = run_all(names, commands, tmp_path, deadline, os.environ, limits, least_s=1)
    assert [found[name]["status"] for name in names] == ["cut", "failed", "not run"]
    assert found["hangs"]["results"] == {"first": 1}
    assert found["hangs"]["error"] == "cut after 2 s"
    assert "exit code 3" in found["dies"]["error"]
    assert not any(map(is_good, found.values()))


def test_the_limits_of_all_stages_fit_into_eight_minutes() -> None:
    assert sum(LIMITS_S.values()) <= 8 * 60


def test_nan_keeps_no_limit(tmp_path: Path) -> None:
    report = Report(tmp_path / "x.json", "x")
    report.check("loss", float("nan"), at_most=1)
    report.check("cosine", 0.5, at_least=0.4)
    checks = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["checks"]
    assert [(check["value"], check["is_within"]) for check in checks] == [(None, False), (0.5, True)]


def test_phases_follow_one_another() -> None:
    meter = Meter(CPU)
    for name in ("a", "b", "a"):
        meter.start(name)
        time.sleep(0.01)
    meter.stop()
    meter.stop()
    assert {name: entry["calls"] for name, entry in meter.phases.items()} == {"a": 2, "b": 1}
    assert meter.phases["a"]["seconds"] >= 0.02


def test_master_weights_do_what_adamw_does_in_float32() -> None:
    ours, theirs = (torch.nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    master = MasterWeights(ours, OPTIMIZER, 2, fused=False)
    adam = torch.optim.AdamW(theirs.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
    inputs = torch.randn(2, 5, 4)
    for each in inputs:
        master.backward(ours(each).square().mean())
        (theirs(each).square().mean() / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), OPTIMIZER.max_grad_norm)
    adam.step()
    assert master.step() == pytest.approx(float(norm))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_the_full_size_is_flux1_dev() -> None:
    assert num_parameters(FULL.transformer) == 11_901_408_320
    assert num_parameters(at_depth(FULL.transformer, 0.5)) == pytest.approx(11_901_408_320 / 2, rel=0.05)


@pytest.mark.parametrize(("gib", "depths"), [(141, (1 / 2, 1 / 4)), (80, (1 / 4, 1 / 8)), (24, ())])
def test_depths_are_chosen_by_the_cards_memory(gib: int, depths: tuple[float, ...]) -> None:
    assert fitting_depths(FULL, gib * 2**30) == depths


def test_random_weights_are_those_of_the_dtype_and_keep_activations_in_size() -> None:
    policy = random_policy(TINY, torch.bfloat16, CPU)
    weights = dict(policy.transformer.named_parameters())
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    assert float(weights["x_embedder.weight"].detach().float().std()) == pytest.approx(64**-0.5, rel=0.1)
    assert not weights["x_embedder.bias"].any()
    assert bool((weights["transformer_blocks.0.attn.norm_q.weight"] == 1).all())


def test_measured_numbers_stand_beside_planned_ones() -> None:
    prediction = Prediction("h100", 0.4, {"rollout": {"seconds": 2.0, "tflop": 900.0, "gib": 24.0}})
    beside = prediction.beside({"rollout": {"seconds": 3.0, "peak_gib": 28.0}}, reward_gib=4.0)
    row = beside["phases"]["rollout"]
    assert (row["seconds_ratio"], row["gib_ratio"], row["tflop_per_second"]) == (1.5, 1.0, 300.0)


def test_extrapolation_is_linear_in_parameters() -> None:
    whole = num_parameters(TINY.transformer)
    steps = {
        share: {"parameters": whole * share, "phases": {"rollout": {"seconds": 1 + 8 * share, "peak_gib": 4 * share}}}
        for share in (1 / 4, 1 / 2)
    }
    assert extrapolated(TINY, steps)["phases"]["rollout"] == {"seconds": 9, "peak_gib": 4}


def make_wheel(folder: Path, name: str, size: int = 10) -> Path:
    wheel = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr(f"{name}/__init__.py", f"NAME = {name!r}\n")
        zipped.writestr(f"{name}/data", os.urandom(size))
        zipped.writestr(f"{name}/tests/test_it.py", "")
    return wheel


def test_packages_are_packed_and_unpacked_without_their_tests(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    pack([make_wheel(tmp_path, "one"), make_wheel(tmp_path, "two")], folder / ARCHIVE)
    site = unpack(folder)
    assert sorted(each.relative_to(site).as_posix() for each in site.rglob("*.py")) == [
        "one/__init__.py",
        "two/__init__.py",
    ]
    assert unpack(folder) == site


def test_a_folder_of_packages_beyond_the_limit_is_refused_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    pack([make_wheel(tmp_path, "large", 30_000)], folder / ARCHIVE)
    assert require_small(folder, MAX_BYTES) < 40_000
    with pytest.raises(WheelsError, match=r"packages\.tar\.xz 0\.0 MB; 0\.0 MB may travel"):
        require_small(folder, 20_000)
    assert not folder.exists()


def test_a_folder_of_other_things_is_not_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert collect_wheels(["--out", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "mine.txt").is_file()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(PackagesError, match="make gpu-wheels"):
        unpack(tmp_path)


def test_versions_are_those_that_are_tested() -> None:
    constraints = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8")
    requirements = pinned(PACKAGES, constraints)
    assert set(requirements) - set(constraints.splitlines()) == {"torchvision==0.26.0"}
    with pytest.raises(WheelsError, match="no version of absent"):
        pinned(["numpy", "absent"], constraints)


def test_the_readme_says_whether_it_ran_on_a_gpu() -> None:
    has_run = (ROOT / "deploy" / "runs" / "results" / "gpu.json").is_file()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ("not run on a GPU so far" in " ".join(readme.split())) == (not has_run)
