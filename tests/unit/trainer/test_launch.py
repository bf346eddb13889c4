"""Bad input: one line that names the thing and the cure, exit code 1, and neither a cluster nor a run left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml

from deploy.settings import free_port
from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.config.run import load_run_config
from tests.encoded import write_latents
from tests.pictures import photo
from tests.serving import reward_app, serve_app
from tests.tiny_judges import make_tiny_judges
from tests.tiny_models import make_tiny_clip
from trainer.launch import main
from trainer.runtime.paths import with_absolute_paths
from trainer.runtime.run_record import create


@pytest.fixture(scope="module")
def reward_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    clip = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    with serve_app(reward_app(Worker({"tiny": ClipArgs(kind="clip", path=str(clip))}, WorkerArgs()))) as url:
        yield url


@pytest.fixture
def run(flux_folder: Path, reward_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that is valid, with its files in the current folder; each test spoils one thing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Path("train.txt").write_text("red heart\n", encoding="utf-8")
    Path("two.txt").write_text("red heart\nkey\n", encoding="utf-8")
    return {
        "name": "tiny",
        "num_steps": 1,
        "model": {"path": str(flux_folder), "height_px": 32, "width_px": 32},
        "prompts": {"path": "train.txt"},
        "control_words": {"positive": "3D", "negative": "Flat"},
        "rewards": [{"name": "tiny"}],
        "reward_service": {"url": reward_url},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"prompts_path": "two.txt"},
        "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    }


def write(run: dict[str, Any]) -> Path:
    path = Path("run.yaml")
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("section", "spoiled", "named"),
    [
        ("model", {"hieght_px": 32}, ["model.hieght_px", "unknown key"]),
        ("model", {"path": "nowhere/at/all"}, ["model.path nowhere/at/all", "no such folder"]),
        ("prompts", {"path": "missing.txt"}, ["missing.txt", "No such file"]),
        ("prompts", {"path": "train.csv"}, ["prompts.path: prompt file", "train.csv", "must end in .txt"]),
        ("prompts", {"embeddings_path": "nowhere"}, ["prompts.embeddings_path", "nowhere", "srpo encode-prompts"]),
        (
            "evaluation",
            {"prompts_path": "empty.txt"},
            ["evaluation.prompts_path", "empty.txt is empty", "one prompt a line"],
        ),
        ("evaluation", {"judge_path": "nowhere"}, ["evaluation.judge_path", "null"]),
        ("objective", {"delta_sigma": 0.5}, ["objective.delta_sigma 0.5", "[0.7500, 0.9643]"]),
        ("evaluation", {"prompts_path": "train.txt"}, ["evaluation.prompts_path", "has one prompt"]),
        ("guard", {"num_prompts": 2}, ["guard.num_prompts 2 is more than the 1 prompts"]),
        (
            "guard",
            {"prompts_path": "two.txt", "num_prompts": 2, "keep_best": {"metric": "guard/fun", "goal": "max"}},
            ["guard.keep_best.metric 'guard/fun' is not measured", "guard/base_pixel_distance, guard/change_color, "],
        ),
        (
            "guard",
            {"prompts_path": "two.txt", "num_prompts": 2, "held_out_reward": "beauty"},
            ["guard.held_out_reward 'beauty' is not served", "served: tiny"],
        ),
        (
            "guard",
            {"prompts_path": "two.txt", "num_prompts": 2, "held_out_reward": "tiny"},
            ["guard.held_out_reward 'tiny' is one that the run trains on"],
        ),
        ("guard", {"stop_when": [{"metric": "guard/reward"}]}, ["guard.stop_when.0", "give one of rises_by"]),
        ("evaluation", {"reference_path": "nowhere"}, ["evaluation.reference_path", "is not a folder"]),
        ("evaluation", {"reference_path": "."}, ["evaluation.reference_path", "has 0 PNG"]),
        ("engine", {"global_batch": 3, "num_workers": 2}, ["global_batch 3 is not a multiple"]),
    ],
)
def test_bad_input_is_named_with_its_cure(
    run: dict[str, Any], section: str, spoiled: dict[str, Any], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    run[section] = run.get(section, {}) | spoiled
    assert_refused(run, named, capsys)


def test_held_out_prompts_without_a_real_picture_or_a_known_subject_are_named(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawings").mkdir()
    photo(32, 32).save(tmp_path / "drawings/heart.png")
    (tmp_path / "drawings/heart.txt").write_text("red heart", encoding="utf-8")
    run["evaluation"]["truth"] = {"path": "drawings"}
    assert_refused(run, ["evaluation.truth has no picture of 'key'"], capsys)
    del run["evaluation"]["truth"]
    real = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    make_tiny_judges(tmp_path / "judge", ("3D", "Flat"), ("red heart", "tulip"), real)
    run["evaluation"]["judge_path"] = "judge"
    assert_refused(run, ["evaluation.judge_path knows no subject 'key' of evaluation.prompts_path"], capsys)


def write_one_image(flux_folder: Path) -> None:
    latents = {(32, 32): (torch.zeros(1, 4, 64), ["red heart"])}
    write_latents(Path("latents"), flux_folder, Path("images").resolve(), latents)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ({"sizes": [[32, 32], [48, 32]]}, ["was encoded for sizes 32 × 32", "32 × 32, 48 × 32", "srpo encode-images"]),
        ({"path": "other"}, ["dataset.latents_path", "which is not that of model.path", "srpo encode-images"]),
    ],
)
def test_latents_of_another_run_are_refused(
    run: dict[str, Any], size: dict[str, Any], named: list[str], flux_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_one_image(flux_folder)
    Path("other/vae").mkdir(parents=True)
    shutil.copy(flux_folder / "model_index.json", "other")
    del run["prompts"]
    run["dataset"] = {"path": "images", "latents_path": "latents"}
    run["model"] |= size
    assert_refused(run, named, capsys)


def test_a_dataset_that_has_changed_is_refused(
    run: dict[str, Any], flux_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_one_image(flux_folder)
    Path("images").mkdir()
    Path("images/heart.png").touch()
    Path("images/heart.txt").write_text("blue heart", encoding="utf-8")
    del run["prompts"]
    run["dataset"] = {"path": "images", "latents_path": "latents"}
    assert_refused(run, ["has changed since it was encoded", "heart.png", "srpo encode-images"], capsys)


def test_a_step_of_sigma_that_no_size_has_room_for_is_named_under_a_dynamic_shift_too(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run["rollout"] = {"shift": "dynamic"}
    run["objective"] = {"sigma_range": [0.2, 0.6], "delta_sigma": 0.5}
    assert_refused(run, ["objective.delta_sigma 0.5", "[0.2000, 0.6000]"], capsys)


def test_a_prompt_that_a_reward_cannot_read_is_named_with_its_place(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.txt").write_text(f"red heart\n{'x' * 60}\n", encoding="utf-8")
    run["evaluation"]["prompts_path"] = "train.txt"
    named = ["does not accept 1 of the 2 longest of 2 prompts under 3D | Flat", "train.txt, line 2", "at most 48"]
    assert_refused(run, named, capsys)


def test_a_prompt_that_is_too_long_under_one_of_several_pairs_is_named_with_it(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"positive": "3D", "negative": "Flat"}, {"positive": "x" * 40, "negative": "Flat"}]
    run["control_words"] = {"kind": "choice", "pairs": pairs}
    assert_refused(run, ["1 of the 1 longest", f"under {'x' * 40} | Flat", "at most 48"], capsys)


def test_a_reward_that_is_not_served_is_named_with_those_that_are(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run["rewards"].append({"name": "beauty"})
    assert_refused(run, ["rewards.1.name 'beauty' is not served", "served: tiny"], capsys)


def test_a_reward_service_that_does_not_answer_is_named_with_its_cure(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run["reward_service"]["url"] = url
    assert_refused(run, [url, "make up"], capsys)


def test_an_unreachable_cluster_is_named_with_its_cure(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{free_port()}")
    assert_refused(run, [address, "unset RAY_ADDRESS"], capsys)


def test_paths_become_absolute_and_a_hub_id_stays(run: dict[str, Any], tmp_path: Path) -> None:
    run["model"]["path"] = "black-forest-labs/FLUX.1-dev"
    run["evaluation"]["judge_path"] = "judge"
    run["prompts"]["embeddings_path"] = "embeddings"
    run["evaluation"]["truth"] = {"path": "drawings"}
    config = with_absolute_paths(load_run_config(write(run)))
    assert config.model.path == "black-forest-labs/FLUX.1-dev"
    assert config.prompts is not None
    assert (config.prompts.path, config.evaluation.prompts_path) == (tmp_path / "train.txt", tmp_path / "two.txt")
    assert config.evaluation.judge_path == tmp_path / "judge"
    assert config.prompts.embeddings_path == tmp_path / "embeddings"
    assert config.evaluation.truth is not None
    assert config.evaluation.truth.path == tmp_path / "drawings"
    del run["prompts"]["path"]
    run["dataset"] = {"path": "images", "latents_path": "latents"}
    dataset = with_absolute_paths(load_run_config(write(run))).dataset
    assert dataset is not None
    assert (dataset.path, dataset.latents_path) == (tmp_path / "images", tmp_path / "latents")
    assert config.output_dir == tmp_path / "outputs"


def test_there_must_be_a_run_to_take_up(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run, ["no run of 'tiny' in", "without --resume"], capsys, "--resume")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optimizer.learning_rate=2e-3", ["changes its training: optimizer.learning_rate 0.001 → 0.002"]),
        ("rewards.0.weight=2", ["rewards.0.weight 1.0 → 2.0"]),
        ("rewards.1.weight=2", ["--set rewards.1.weight=2: no such key"]),
        ("num_steps", ["--set num_steps: write KEY=VALUE"]),
    ],
)
def test_a_run_is_not_taken_up_under_another_training(
    run: dict[str, Any], change: str, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = create(with_absolute_paths(load_run_config(write(run))))
    before = folder.record()
    assert_refused(run, named, capsys, "--resume", folder.id, "--set", change)
    assert folder.record() == before


def test_a_run_that_another_process_trains_is_not_taken_up(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = create(with_absolute_paths(load_run_config(write(run))))
    with folder.locked():
        assert_refused(run, [f"run {folder.id} is training already (process {os.getpid()} on "], capsys, "--resume")


def assert_refused(run: dict[str, Any], named: list[str], capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    runs = sorted(Path("outputs").rglob("run.json"))
    assert main([str(write(run)), *arguments]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for part in named:
        assert part in lines[0]
    assert "Traceback" not in error
    assert not ray.is_initialized()
    assert sorted(Path("outputs").rglob("run.json")) == runs, "no run has begun"
