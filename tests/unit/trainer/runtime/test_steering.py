"""Steering of a run: what it applies, refuses and restores after a restart, and a silent MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from services.clients.spool import Spool
from services.clients.tracking import TrackingError
from services.config.run import RunConfig, load_run_config
from services.config.steering import ERROR_TAG, TAG, Steering, SteeringError, version_tag
from trainer.runtime.steering import LiveSteering, UnansweredError

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
CPU = torch.device("cpu")


def refuse_long_words(config: RunConfig) -> None:
    """Refuse words of more than 10 characters, as a reward service may."""
    if len(config.control_words.positive) > 10:
        raise SteeringError("reward fluent-clip does not accept it")


class Run:
    """A run's record, and the tags of its MLflow run: what a person has set there, and what the record has."""

    def __init__(self, folder: Path) -> None:
        self.record, self.requested, self.is_silent = Spool(folder), dict[str, str](), False
        self.step = 0

    def tags(self) -> dict[str, str]:
        if self.is_silent:
            raise TrackingError("MLflow at nowhere does not answer")
        names = [ERROR_TAG, *(version_tag(number) for number in range(1, 9))]
        return self.requested | {name: value for name in names if (value := self.record.tag(name)) is not None}

    def steering(self, check: Callable[[RunConfig], None] | None = None) -> LiveSteering:
        return LiveSteering(load_run_config(RUN), CPU, self.record, self.tags, check or refuse_long_words)

    def take_step(self, steering: LiveSteering) -> None:
        """Sync as before a step, and record the step."""
        steering.sync(self.step)
        self.step += 1
        self.record.log_metrics("step", {"steering_version": steering.in_force.version}, self.step)


def words(steering: LiveSteering) -> tuple[str, str]:
    return steering.config.control_words.positive, steering.config.control_words.negative


@pytest.fixture(autouse=True)
def lone_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_it_applies_the_tag_and_keeps_the_history(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    steering = run.steering()
    run.take_step(steering)
    assert (steering.in_force.version, words(steering)) == (0, ("3D", "Flat"))
    run.requested[TAG] = Steering(positive="Flat", negative="3D", version=1).to_tag()
    for _ in range(2):
        run.take_step(steering)
        assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
    run.requested[TAG] = '{"positive": "Öl", "negative": "3D", "preference_scale": 0.5, "version": 1}'  # by hand
    for _ in range(2):
        run.take_step(steering)
        assert (steering.in_force.version, words(steering)) == (2, ("Öl", "3D"))
        assert steering.config.rewards[0].preference_scale_invert.start == 0.5
    del run.requested[TAG]
    run.take_step(steering)
    assert (steering.in_force.version, words(steering)) == (3, ("3D", "Flat"))
    kept = [json.loads(str(run.record.tag(version_tag(number)))).get("positive") for number in (1, 2, 3)]
    assert kept == ["Flat", "Öl", None]
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
    run: Run, tag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = run.steering()
    run.requested[TAG] = '{"positive": "Flat", "negative": "3D"}'
    run.take_step(steering)
    run.requested[TAG] = tag
    for _ in range(3):
        run.take_step(steering)
        assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
        assert reason in str(run.record.tag(ERROR_TAG))
        assert "version 1: Flat | 3D stays in force" in str(run.record.tag(ERROR_TAG))
    (refusal,) = (line for line in capsys.readouterr().out.splitlines() if "refused" in line)
    assert reason in refusal
    run.requested[TAG] = '{"positive": "Flat", "negative": "3D"}'  # already in force
    run.take_step(steering)
    assert steering.in_force.version == 1
    assert run.record.tag(ERROR_TAG) is None


def test_after_the_last_version_an_edit_is_refused_and_the_run_goes_on(run: Run) -> None:
    steering = run.steering()
    run.requested[TAG] = '{"positive": "Flat", "negative": "3D", "version": 1000000000}'
    run.take_step(steering)
    run.requested[TAG] = '{"positive": "Oil", "negative": "3D"}'
    for _ in range(2):
        run.take_step(steering)
        assert (steering.in_force.version, words(steering)) == (10**9, ("Flat", "3D"))
        assert "version 1000000000 is in force, the last there is" in str(run.record.tag(ERROR_TAG))


def test_a_check_without_answer_is_repeated_and_a_refused_one_is_not(run: Run) -> None:
    answers: list[SteeringError | None] = [UnansweredError("busy"), UnansweredError("busy"), SteeringError("too long")]

    def answer(_: RunConfig) -> None:
        if error := answers.pop(0):
            raise error

    steering = run.steering(answer)
    run.requested[TAG] = '{"positive": "Flat", "negative": "3D"}'
    for left, reason in ((2, "busy"), (1, "busy"), (0, "too long"), (0, "too long")):
        run.take_step(steering)
        assert (len(answers), steering.in_force.version) == (left, 0)
        assert reason in str(run.record.tag(ERROR_TAG))


def test_repeated_steps_have_what_they_had_and_new_ones_what_the_tag_says(run: Run, tmp_path: Path) -> None:
    steering, seen, checkpoint = run.steering(), [], ""
    requests = [None, '{"positive": "Flat", "negative": "3D"}', '{"positive": "Oil", "negative": "3D"}', None]
    for step, text in enumerate(requests):
        run.requested = {} if text is None else {TAG: text}
        run.take_step(steering)
        seen.append(words(steering))
        if step == 1:
            checkpoint = steering.in_force.to_tag()
    run.requested = {TAG: '{"positive": "Photo", "negative": "3D"}'}
    again = Run(tmp_path)
    again.requested = run.requested
    resumed = again.steering()
    resumed.restore(checkpoint)
    for step in (2, 3, 4):
        again.step = step
        again.take_step(resumed)
        seen.append(words(resumed))
    assert seen[4:] == [*seen[2:4], ("Photo", "3D")]
    assert resumed.in_force.version == 4
    begun_anew = again.steering()
    begun_anew.sync(1)
    assert words(begun_anew) == ("Flat", "3D"), "without any checkpoint"


def test_without_mlflow_all_stays_as_it_is(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    steering = run.steering()
    run.requested[TAG] = '{"positive": "Flat", "negative": "3D"}'
    run.take_step(steering)
    run.requested[TAG] = '{"positive": "Oil", "negative": "3D"}'
    run.is_silent = True
    run.take_step(steering)
    assert (steering.in_force.version, words(steering)) == (1, ("Flat", "3D"))
    assert "does not answer" in caplog.text
    run.is_silent = False
    run.take_step(steering)
    assert (steering.in_force.version, words(steering)) == (2, ("Oil", "3D"))
