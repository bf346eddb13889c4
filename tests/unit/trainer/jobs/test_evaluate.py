"""A comparison on the real classes at tiny sizes: base, an unchanged model and a changed one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from torchvision.transforms.functional import to_pil_image

from services.clients.checkpoint_store import CheckpointStore
from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import FinetuneConfig
from services.config.run import load_run_config
from tests.tiny_flux import HEIGHT_PX, PROMPTS, WIDTH_PX, changed_copy
from tests.workers import in_workers
from trainer.jobs.evaluate import main, named_folders
from trainer.jobs.evaluate_share import EvaluateError
from trainer.model.fragments import Fragments
from trainer.model.lora import add_adapter, whole
from trainer.model.policy import Policy

CHECKPOINT = "step_00000001_a"


def test_base_and_others_get_numbers_with_intervals_a_report_and_a_record(
    run_file: Path, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow lays artifacts beside
    other = changed_copy(flux_folder, tmp_path / "other")
    assert main([str(run_file), f"same={flux_folder}", str(other)]) == 0
    folder = tmp_path / "outputs" / "tiny" / "comparison"
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    assert list(numbers) == ["base", "same", "other"]
    for name in ("reward_trained", "reward_held_out", "saturation", "diversity_seeds", "base_pixel_distance"):
        value, difference = numbers["other"][name]["value"], numbers["other"][name]["difference"]
        assert value["low"] <= value["value"] <= value["high"]
        assert difference["value"] == pytest.approx(value["value"] - numbers["base"][name]["value"]["value"])
        same = numbers["same"][name]["difference"]
        assert (same["low"], same["value"], same["high"]) == pytest.approx((0, 0, 0), abs=1e-6)
    assert numbers["other"]["base_pixel_distance"]["difference"]["low"] > 0
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 3 * 4 * 2
    assert "The run trains on trained" in report
    client = mlflow.MlflowClient(load_run_config(run_file).tracking.uri)
    (record,) = client.search_runs([client.get_experiment_by_name("srpo").experiment_id])
    assert record.info.status == "FINISHED"
    assert record.data.metrics["other/saturation"] == pytest.approx(numbers["other"]["saturation"]["value"]["value"])
    assert {"other/saturation_low", "other/saturation_difference_high"} <= set(record.data.metrics)
    assert {item.path for item in client.list_artifacts(record.info.run_id)} == {"report.html", "numbers.json"}


def test_a_model_stands_between_the_base_and_the_base_that_is_told_the_word(
    run_file: Path, flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random, drawings = torch.Generator().manual_seed(0), tmp_path / "drawings"
    drawings.mkdir()
    for index, prompt in enumerate(PROMPTS[:4]):
        pixels = torch.randint(0, 256, (3, HEIGHT_PX, WIDTH_PX), dtype=torch.uint8, generator=random)
        to_pil_image(pixels).save(drawings / f"{index}.png")
        (drawings / f"{index}.txt").write_text(prompt, encoding="utf-8")
    run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    run["evaluation"]["truth"] = {"path": str(drawings)}
    run["evaluation"]["draws_oracle"] = True
    run_file.write_text(yaml.safe_dump(run), encoding="utf-8")
    assert main([str(run_file), f"same={flux_folder}", str(changed_copy(flux_folder, tmp_path / "other"))]) == 0
    table = (tmp_path / "outputs/tiny/comparison/numbers.json").read_text(encoding="utf-8")
    numbers = json.loads(table)
    assert list(numbers) == ["base", "oracle", "same", "other"]
    means = {name: {key: each["value"]["value"] for key, each in column.items()} for name, column in numbers.items()}
    assert not [key for key in means["base"] | means["oracle"] if key.startswith("gap_closed")]
    for measure in ("l1", "ssim", "edge_correlation"):
        base, oracle, other = (means[name][f"truth_{measure}"] for name in ("base", "oracle", "other"))
        assert means["same"][f"gap_closed_{measure}"] == pytest.approx(0, abs=1e-6)
        assert means["other"][f"gap_closed_{measure}"] == pytest.approx((base - other) / (base - oracle))


def save_policy(rank: int, flux_folder: Path, finetune: FinetuneConfig, zero_stage: Any, folder: Path) -> None:
    """A policy that has moved, as the training keeps it and as it exports it."""
    from trainer.model.engine import Engine, init_distributed

    init_distributed(use_gpu=False)
    flux = Policy.load(str(flux_folder), torch.float32)
    if finetune.kind == "lora":
        add_adapter(flux.transformer, finetune, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flux.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    optimizer, layout = OptimizerConfig(learning_rate=1e-3), EngineConfig(zero_stage=zero_stage)
    engine = Engine.create(flux.transformer, optimizer, layout, 1, torch.float32)
    place = CheckpointStore(str(folder)).place(1, "a")
    with place.written("policy_0.safetensors", rank) as path:
        engine.snapshot().save(path)
    place.complete({"step": 1}, num_workers=1)
    engine.export(lambda policy: flux.save_pipeline(whole(policy, finetune), folder / "model"))


@pytest.mark.parametrize(("finetune", "zero_stage"), [({"kind": "full"}, 3), ({"kind": "lora", "rank": 2}, 2)])
def test_a_checkpoint_draws_what_its_exported_model_draws_whatever_was_looked_at_before(
    run_file: Path,
    flux_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finetune: dict[str, Any],
    zero_stage: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    run_file.write_text(yaml.safe_dump(run | {"finetune": finetune}), encoding="utf-8")
    in_workers(1, save_policy, flux_folder, FinetuneConfig.model_validate(finetune), zero_stage, tmp_path)
    changed_copy(flux_folder, tmp_path / "other")
    assert main([str(run_file), "other", f"checkpoint={CHECKPOINT}", "model"]) == 0
    numbers = json.loads((tmp_path / "outputs/tiny/comparison/numbers.json").read_text(encoding="utf-8"))
    of_checkpoint, of_model, of_other = (numbers[name] for name in ("checkpoint", "model", "other"))
    for name, number in of_model.items():
        assert of_checkpoint[name]["value"]["value"] == pytest.approx(number["value"]["value"], rel=1e-3, abs=1e-4), (
            name
        )
    distances = [each["base_pixel_distance"]["value"]["value"] for each in (of_checkpoint, of_other)]
    assert min(distances) > 1e-3
    assert distances[0] != pytest.approx(distances[1], rel=0.05), "they can be told apart"


def test_what_is_not_there_is_named_in_one_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "outputs/tiny/latest/model is neither a model folder nor a checkpoint" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("damage", ["other", "code"])
def test_a_checkpoint_that_is_not_the_runs_is_refused_and_no_code_in_it_is_run(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = CheckpointStore(str(tmp_path)).place(1, "a")
    with place.written("policy_0.safetensors", 0) as file:
        if damage == "code":
            torch.save({"x": Trap(tmp_path / "sprung")}, file)
        else:
            Fragments(1, {"x": (1,)}, {"x": range(1)}, {"weights": {"x": torch.ones(1)}}).save(file)
    place.complete({"step": 1}, num_workers=1)
    assert main([str(run_file), CHECKPOINT]) == 1
    assert f"{CHECKPOINT} is no checkpoint of this run" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Pickled, it makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)  # a plain function, as an attacker would take one


def test_two_policies_of_one_name_are_refused(flux_folder: Path) -> None:
    with pytest.raises(EvaluateError, match=r"two policies are called 'base'"):
        named_folders([f"base={flux_folder}"])
    with pytest.raises(EvaluateError, match=flux_folder.name):
        named_folders([str(flux_folder), str(flux_folder)])
