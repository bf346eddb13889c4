"""`srpo steer` against a real MLflow store: what it writes, and what it refuses before writing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.settings import free_port
from services.clients.reward import RewardClient
from services.clients.tracking import Tracker
from services.commands.main import main
from services.config.run import load_run_config
from services.config.steering import TAG, Steering, SteeringError, version_tag
from trainer.data.prompt_files import LocatedPrompt
from trainer.runtime.steering import UnansweredError, check_with_service

RUN = Path(__file__).resolve().parents[3] / "deploy" / "runs" / "tiny_srpo.yaml"
PAIR = ("--positive", "Flat", "--negative", "3D")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def run(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)  # a store in a file puts artifacts below the current folder
    tracker = Tracker.start(uri, "steering", "tiny_srpo")
    tracker.log_file(RUN)
    return tracker


def steer(run: Tracker, *arguments: str, name: str = "tiny_srpo") -> int:
    return main(["steer", name, *arguments, "--tracking-uri", run.uri])


def test_the_latest_running_run_of_a_name_is_steered(run: Tracker, capsys: pytest.CaptureFixture[str]) -> None:
    later = Tracker.start(run.uri, "another experiment", "tiny_srpo")
    later.finish("FINISHED")
    assert steer(run, *PAIR) == 0
    assert json.loads(run.tags()[TAG]) == {"positive": "Flat", "negative": "3D", "version": 1}
    assert TAG not in later.tags()
    assert capsys.readouterr().out.splitlines() == [
        "tiny_srpo from its next step on: version 1: Flat | 3D",
        "before, version 0: as in the run file",
    ]
    assert steer(run, "--preference-scale", "-.5", "--weights", "fluent-clip=.5", name=run.run_id) == 0
    assert json.loads(run.tags()[TAG]) == {"preference_scale": -0.5, "weights": {"fluent-clip": 0.5}, "version": 2}
    assert "before, version 1: Flat | 3D" in capsys.readouterr().out


def test_its_version_is_above_all_that_came_into_force(run: Tracker, capsys: pytest.CaptureFixture[str]) -> None:
    run.set_tag(TAG, "spoilt by hand")
    run.set_tag(version_tag(4), '{"positive": "Oil", "negative": "3D", "version": 4}')
    assert steer(run, "--reset") == 0
    assert json.loads(run.tags()[TAG]) == {"version": 5}
    assert "before, version 4: Oil | 3D" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "nothing is requested"),
        ((*PAIR, "--reset"), "--reset"),
        (PAIR[:2], "negative is missing"),
        (("--positive", "", "--negative", "3D"), "positive: "),
        (("--preference-scale", "nan"), "preference_scale: "),
        (("--weights", "fluent-clip"), "'fluent-clip' is not NAME=NUMBER"),
        (("--weights", "fluent-clip=0"), "weights.fluent-clip: "),
        (("--weights", "hpsv2.1=1"), "no reward 'hpsv2.1'; it has fluent-clip"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    run: Tracker, arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steer(run, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert TAG not in run.tags()


def test_a_run_that_is_not_training_is_refused(run: Tracker, capsys: pytest.CaptureFixture[str]) -> None:
    run.finish("FINISHED")
    for name in (run.run_id, "nobody"):
        assert steer(run, *PAIR, name=name) == 1
        assert f"'{name}': no run of this name or id is running" in capsys.readouterr().err


def test_words_that_the_reward_service_refuses_are_refused(reward_url: str) -> None:
    config = load_run_config(RUN)
    config = config.model_copy(update={"rewards": (config.rewards[0].model_copy(update={"name": "tiny-clip"}),)})
    drawn = [LocatedPrompt("fox", "train.txt, line 1")]
    with RewardClient(reward_url, max_attempts=1) as client:
        steered = Steering(positive="Oil", negative="3D", preference_scale=2.0)
        check_with_service(client, drawn, steered.applied_to(config))
        with pytest.raises(SteeringError, match=r"tiny-clip does not accept 1 of .*max_text_chars"):
            check_with_service(client, drawn, Steering(positive="Oil" * 1000, negative="3D").applied_to(config))
    with RewardClient(f"http://127.0.0.1:{free_port()}", max_attempts=1) as client, pytest.raises(UnansweredError):
        check_with_service(client, drawn, config)
