"""What a tag may request, which version it becomes, and how it changes the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.config.rewards import ControlWordsConfig
from services.config.run import RunConfig, load_run_config
from services.config.steering import TAG, Steering, SteeringError, last_in_force, version_tag

RUN = Path(__file__).resolve().parents[4] / "deploy" / "runs" / "tiny_srpo.yaml"
WORDS = st.one_of(st.none(), st.sampled_from(["3D", "Flat", "Oil painting"]))


@st.composite
def steerings(draw: st.DrawFn) -> Steering:
    positive = draw(WORDS)
    return Steering(
        version=draw(st.integers(0, 9)),
        positive=positive,
        negative=positive and "Sketch",
        preference_scale=draw(st.one_of(st.none(), st.floats(-5, 5))),
        weights=draw(st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0.1, 5))),
    )


@pytest.fixture
def run() -> RunConfig:
    """Return a run with two rewards: one reads the run's words, one has words of its own."""
    config = load_run_config(RUN)
    words = ControlWordsConfig(positive="Red", negative="Blue")
    own = config.rewards[0].model_copy(update={"name": "own", "weight": 2.0, "control_words": words})
    return config.model_copy(update={"rewards": (*config.rewards, own)})


@given(steerings())
def test_a_tag_is_read_as_it_was_written(steering: Steering) -> None:
    assert Steering.from_tag(steering.to_tag()) == steering


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ("", "not JSON"),
        ("3D | Flat", "not JSON.*3D"),
        ("[]", "valid dictionary"),
        pytest.param("[" * 5000, "not JSON: .*recursion", id="deep"),
        ('{"positive": "3D"}', "negative is missing"),
        ('{"negative": "3D"}', "positive is missing"),
        ('{"positive": " ", "negative": "3D"}', "^positive: .*at least 1 character.*' '"),
        ('{"positive": 3, "negative": "3D"}', "^positive: .*got 3"),
        ('{"positiv": "3D", "negative": "Flat"}', "^positiv: unknown key"),
        ('{"preference_scale": NaN}', "^preference_scale: .*finite.*nan"),
        ('{"preference_scale": 1e39}', "^preference_scale: .*1e"),
        ('{"preference_scale": "0.1"}', "^preference_scale: .*'0.1'"),
        ('{"weights": {"a": 0}}', "^weights.a: .*greater than 0.*got 0"),
        ('{"weights": {"a": -Infinity}}', "^weights.a: .*-inf"),
        ('{"weights": [1]}', "^weights: "),
        ('{"version": "2"}', "^version: .*'2'"),
        ('{"version": -2}', "^version: .*-2"),
    ],
)
def test_a_malformed_tag_is_refused_by_name(tag: str, named: str) -> None:
    with pytest.raises(SteeringError, match=named):
        Steering.from_tag(tag)


def test_a_long_tag_is_not_repeated_in_full() -> None:
    with pytest.raises(SteeringError) as error:
        Steering.from_tag(json.dumps({str(number): "x" * 100 for number in range(70)}))
    assert len(str(error.value)) <= 500


@given(steerings(), steerings())
def test_each_change_has_a_version_of_its_own(requested: Steering, in_force: Steering) -> None:
    after = requested.after(in_force)
    assert after.version > in_force.version or after == in_force
    assert after.model_copy(update={"version": requested.version}) == requested, (
        "it comes into force as it was requested for"
    )
    assert requested.after(after) == after, "and only once"


def test_versions_follow_the_command_and_count_edits_by_hand() -> None:
    third = Steering(positive="3D", negative="Flat", version=3)
    assert third.after(Steering()) == third
    edited = Steering(positive="Oil", negative="Flat", version=3).after(third)
    assert edited.version == 4
    assert Steering.from_tag(None).after(edited) == Steering(version=5), "without a tag all is as in the run file"
    assert Steering().after(Steering()).version == 0


def test_after_the_last_version_there_is_none() -> None:
    last = Steering.from_tag('{"positive": "3D", "negative": "Flat", "version": 1000000000}')
    assert last.after(last) == last
    for requested in (Steering(), Steering(positive="Oil", negative="Flat", version=1000000000)):
        with pytest.raises(SteeringError, match="version 1000000000 is in force, the last there is"):
            requested.after(last)


def test_the_run_goes_on_with_what_was_requested(run: RunConfig) -> None:
    requested = Steering(positive="Oil", negative="Photo", preference_scale=0.5, weights={"own": 0.25})
    requested.check(run)
    after = requested.applied_to(run)
    assert (after.control_words.positive, after.control_words.negative) == ("Oil", "Photo")
    assert [reward.weight for reward in after.rewards] == [1.0, 0.25]
    scales = {
        (scale.kind, scale.start)
        for reward in after.rewards
        for scale in (reward.preference_scale_denoise, reward.preference_scale_invert)
    }
    assert scales == {("constant", 0.5)}
    assert after.rewards[1].control_words == run.rewards[1].control_words, "a reward's own words stay"
    same = {"control_words": run.control_words, "rewards": run.rewards}
    assert after.model_copy(update=same) == run, "and nothing else changes"
    assert Steering().applied_to(run) == run
    assert RunConfig.model_validate(after.model_dump()) == after


@pytest.mark.parametrize(
    ("requested", "spoilt", "named"),
    [
        ({"weights": {"nobody": 1.0}}, {}, "no reward 'nobody'; it has fluent-clip, own"),
        ({"preference_scale": 0.5}, {"kind": "srp"}, "preference_scale has no effect.*srp,"),
        ({"positive": "Oil", "negative": "3D"}, {"kind": "plain"}, "no effect.*plain"),
    ],
)
def test_an_unknown_or_ineffective_request_is_refused(
    run: RunConfig, requested: dict[str, Any], spoilt: dict[str, Any], named: str
) -> None:
    run = run.model_copy(update={"objective": run.objective.model_copy(update=spoilt)})
    with pytest.raises(SteeringError, match=named):
        Steering.model_validate(requested).check(run)


def test_words_that_no_reward_reads_are_refused(run: RunConfig) -> None:
    with pytest.raises(SteeringError, match="each reward of the run has a pair of its own"):
        Steering(positive="Oil", negative="3D").check(run.model_copy(update={"rewards": run.rewards[1:]}))


def test_the_last_version_of_a_run_is_found_among_its_tags() -> None:
    second, tenth = Steering(positive="3D", negative="Flat", version=2), Steering(version=10)
    tags = {version_tag(each.version): each.to_tag() for each in (tenth, second)}
    others = {TAG: '{"version": 12}', version_tag(11): "spoilt", f"{TAG}.note": '{"version": 13}', "job": "{}"}
    assert last_in_force(tags | others) == tenth
    assert last_in_force(others) == Steering()
