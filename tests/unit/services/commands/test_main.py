"""The command as a person calls it: a mistake gives exit code 1 and one line that says what is wrong and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deploy.settings import free_port
from services.commands.jobs import JOB_VERBS

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
PAIR = ("--prompt", "red heart", "--positive", "3D", "--negative", "Flat")


def srpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.commands.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def absent_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def assert_one_line(result: subprocess.CompletedProcess[str], *named: str) -> None:
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    for part in named:
        assert part in line


@pytest.mark.parametrize("command", ["run", "submit", "encode-prompts", "evaluate", "encode-images"])
def test_an_unknown_key_is_named(command: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(RUN.read_text(encoding="utf-8") + "\nnum_step: 60\n", encoding="utf-8")
    assert_one_line(srpo(command, str(run)), str(run), "num_step", "60")


@pytest.mark.parametrize("command", ["encode-images", "encode"])
def test_a_run_without_a_dataset_has_nothing_to_encode(command: str) -> None:
    assert_one_line(srpo(command, str(RUN)), "tiny_srpo.yaml has no dataset")


def test_the_old_names_of_verbs_are_accepted() -> None:
    assert {old: verb.name for verb in JOB_VERBS for old in verb.old_names} == {
        "embed": "encode-prompts",
        "encode": "encode-images",
    }


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    assert_one_line(srpo("run", str(tmp_path / "absent.yaml")), "absent.yaml")


@pytest.mark.parametrize(
    "arguments",
    [(name, str(RUN)) for name in ("submit", "embed", "encode-prompts", "evaluate")] + [("jobs",), ("stop", "job")],
)
def test_an_absent_cluster_is_named_with_advice(arguments: tuple[str, ...], absent_url: str) -> None:
    assert_one_line(srpo(*arguments, "--address", absent_url), absent_url, "make up")


def test_an_absent_reward_service_is_named_with_advice(picture: str, absent_url: str) -> None:
    assert_one_line(srpo("score", picture, *PAIR, "--url", absent_url), absent_url, "make up")


def test_sample_names_a_missing_model_and_a_missing_folder(tmp_path: Path) -> None:
    missing = srpo("sample", str(tmp_path / "absent"), "--prompt", "key", "-o", str(tmp_path / "out.png"))
    assert missing.returncode == 1
    assert "model.path" in missing.stderr.splitlines()[-1]
    nowhere = srpo("sample", "model", "--prompt", "key", "-o", str(tmp_path / "nowhere" / "out.png"))
    assert nowhere.returncode == 1
    assert "nowhere" in nowhere.stderr.splitlines()[-1]


def test_an_unknown_option_is_refused() -> None:
    assert srpo("jobs", "--adress", "x").returncode == 2
