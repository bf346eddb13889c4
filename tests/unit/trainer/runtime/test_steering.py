"""Steering on a real MLflow run: what it applies, refuses and restores after a restart, and a silent MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from services.clients.tracking import Tracker
from services.config.run import RunConfig, load_run_config
from services.config.steering import ERROR_TAG, TAG, Steering, SteeringError, version_tag
from trainer.runtime.steering import LiveSteering, UnansweredError

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
CPU = torch.device("cpu")


def refuse_long_words(config: RunConfig) -> None:
    """Refuse words of more than 10 characters, as a reward service may."""
    if len(config.control_words.positive) > 10:
        raise SteeringError("reward fluent-clip does not accept it")


def make_steering(tracker: Tracker) -> LiveSteering:
    return LiveSteering(load_run_config(RUN), CPU, tracker, lambda write: write(tracker), refuse_long_words)


def words(steering: LiveSteering) -> tuple[str, str]:
    return steering.config.control_words.positive, steering.config.control_words.negative


@pytest.fixture(autouse=True)
def lone_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracker(uri: str) -> Tracker:
    return Tracker.start(uri, "test", "steered")


def test_it_applies_the_tag_and_keeps_the_history(tracker: Tracker, capsys: pytest.CaptureFixture[str]) -> None:
    steering = make_steering(tracker)
    steering.sync()
    assert (steering.in_force.version, words(steering)) == (0, ("3D", "Flat"))
    tracker.set_tag(TAG, Steering(positive="Flat", negative="3D", version=1).to_tag())
    for _ in range(2):
        steering.sync()
        assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
    tracker.set_tag(TAG, '{"positive": "Öl", "negative": "3D", "preference_scale": 0.5, "version": 1}')  # by hand
    for _ in range(2):
        steering.sync()
        assert (steering.in_force.version, words(steering)) == (2, ("Öl", "3D"))
        assert steering.config.rewards[0].preference_scale_invert.start == 0.5
    tracker.clear_tag(TAG)
    steering.sync()
    assert (steering.in_force.version, words(steering)) == (3, ("3D", "Flat"))
    assert [json.loads(tracker.tags()[version_tag(number)]).get("positive") for number in (1, 2, 3)] == [
        "Flat",
        "Öl",
        None,
    ]
    assert capsys.readouterr().out.splitlines() == [
        "steered to version 1: Flat | 3D",
        "steered to version 2: Öl | 3D, k 0.5",
        "steered to version 3: as in the run file",
    ]


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ('{"positive": ""}', "positive: "),
        ('{"weights": {"pickscore": 1}}', "no reward 'pickscore'"),
        ('{"positive": "far too long", "negative": "3D"}', "fluent-clip does not accept it"),
    ],
)
def test_a_refused_tag_is_reported_and_changes_nothing(
    tracker: Tracker, tag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = make_steering(tracker)
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D"}')
    steering.sync()
    tracker.set_tag(TAG, tag)
    for _ in range(3):
        steering.sync()
        assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
        assert reason in tracker.tags()[ERROR_TAG]
        assert "version 1: Flat | 3D stays in force" in tracker.tags()[ERROR_TAG]
    (refusal,) = (line for line in capsys.readouterr().out.splitlines() if "refused" in line)
    assert reason in refusal
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D"}')  # already in force
    steering.sync()
    assert steering.in_force.version == 1
    assert ERROR_TAG not in tracker.tags()


def test_after_the_last_version_an_edit_is_refused_and_the_run_goes_on(tracker: Tracker) -> None:
    steering = make_steering(tracker)
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D", "version": 1000000000}')
    steering.sync()
    tracker.set_tag(TAG, '{"positive": "Oil", "negative": "3D"}')
    for _ in range(2):
        steering.sync()
        assert (steering.in_force.version, words(steering)) == (10**9, ("Flat", "3D"))
        assert "version 1000000000 is in force, the last there is" in tracker.tags()[ERROR_TAG]


def test_a_check_without_answer_is_repeated_and_a_refused_one_is_not(tracker: Tracker) -> None:
    answers: list[SteeringError | None] = [UnansweredError("busy"), UnansweredError("busy"), SteeringError("too long")]

    def answer(_: RunConfig) -> None:
        if error := answers.pop(0):
            raise error

    steering = LiveSteering(load_run_config(RUN), CPU, tracker, lambda write: write(tracker), answer)
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D"}')
    for left, reason in ((2, "busy"), (1, "busy"), (0, "too long"), (0, "too long")):
        steering.sync()
        assert (len(answers), steering.in_force.version) == (left, 0)
        assert reason in tracker.tags()[ERROR_TAG]


def test_a_restart_takes_the_later_steering_of_run_and_checkpoint(tracker: Tracker, tmp_path: Path) -> None:
    steering = make_steering(tracker)
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D"}')
    steering.sync()
    steering.save(tmp_path)
    restarted = make_steering(tracker)
    assert words(restarted) == ("Flat", "3D"), "without a checkpoint"
    tracker.clear_tag(version_tag(1))  # as if it were not written yet
    restarted = make_steering(tracker)
    restarted.load(tmp_path)
    restarted.sync()
    assert (restarted.in_force.version, words(restarted)) == (1, ("Flat", "3D"))
    tracker.set_tag(TAG, '{"positive": "Oil", "negative": "3D"}')
    restarted.sync()
    again = make_steering(tracker)
    again.load(tmp_path)
    again.sync()
    assert (again.in_force.version, words(again)) == (2, ("Oil", "3D"))


def test_without_mlflow_all_stays_as_it_is(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steering = make_steering(tracker)
    tracker.set_tag(TAG, '{"positive": "Flat", "negative": "3D"}')
    steering.sync()
    tracker.set_tag(TAG, '{"positive": "Oil", "negative": "3D"}')
    run_id, tracker.run_id = tracker.run_id, "no_such_run"
    steering.sync()
    assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
    assert "no_such_run" in caplog.text
    tracker.run_id = run_id
    steering.sync()
    assert (steering.in_force.version, words(steering)) == (2, ("Oil", "3D"))
