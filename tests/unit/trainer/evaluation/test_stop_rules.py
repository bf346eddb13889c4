"""Stop rules on checks written by hand: when a run ends, and which weights it then exports."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.config.evaluation import GuardConfig, StopRuleConfig
from trainer.evaluation.stop_rules import Check, best_check, bound, broken_rule, exported_check, require_sound_base

FRECHET, SHARE = "guard/frechet_Flat", "guard/style_share_Flat"


def settings(*rules: dict[str, Any], keep_best: dict[str, str] | None = None) -> GuardConfig:
    return GuardConfig.model_validate({"stop_when": rules, "keep_best": keep_best})


def checks_of(*values: float, shares: tuple[float, ...] = ()) -> list[Check]:
    """Return checks every ten steps with these Fréchet distances, and with shares of 0.5 if none are given."""
    shares = shares or (0.5,) * len(values)
    pairs = zip(values, shares, strict=True)
    return [Check(10 * index, {FRECHET: value, SHARE: share}) for index, (value, share) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("rule", "base", "limit"),
    [
        ({"rises_by": 0.5}, 4.0, 6.0),
        ({"rises_by": 0.5}, -4.0, -2.0),  # rising is rising, whatever the sign
        ({"falls_by": 0.25}, 4.0, 3.0),
        ({"falls_by": 0.25}, -4.0, -5.0),
        ({"above": 7.0}, 4.0, 7.0),
        ({"below": -1.0}, 4.0, -1.0),
    ],
)
def test_bounds_are_shares_of_the_base_value_or_absolute(rule: dict[str, float], base: float, limit: float) -> None:
    assert bound(StopRuleConfig.model_validate({"metric": FRECHET} | rule), base) == limit


def test_a_rule_ends_the_run_at_the_first_check_beyond_its_bound() -> None:
    rules = settings({"metric": FRECHET, "rises_by": 0.5})
    assert broken_rule(rules, checks_of(4.0, 5.9, 6.0)) is None
    reason = broken_rule(rules, checks_of(4.0, 5.9, 6.1))
    assert reason == "guard/frechet_Flat 6.1 at step 20: rises_by 0.5 (base 4, bound 6)"


def test_patience_counts_checks_on_end() -> None:
    rules = settings({"metric": FRECHET, "above": 6.0, "num_checks": 2})
    assert broken_rule(rules, checks_of(4.0, 7.0, 5.0, 7.0)) is None
    reason = broken_rule(rules, checks_of(4.0, 7.0, 5.0, 7.0, 8.0))
    assert reason is not None
    assert "7, 8 at step 30, 40: above 6 for 2 checks" in reason


def test_a_falling_metric_and_any_of_several_rules_end_a_run() -> None:
    rules = settings({"metric": FRECHET, "rises_by": 9.0}, {"metric": SHARE, "falls_by": 0.2})
    assert broken_rule(rules, checks_of(4.0, 5.0, shares=(0.5, 0.41))) is None
    assert broken_rule(rules, checks_of(4.0, 5.0, shares=(0.5, 0.39))) is not None


def test_without_keep_best_the_last_sound_check_is_given_or_the_last_step() -> None:
    rules = settings({"metric": FRECHET, "above": 6.0, "num_checks": 2})
    assert exported_check(rules, checks_of(4.0, 5.0, 5.5)).step == 20
    assert exported_check(rules, checks_of(4.0, 5.0, 7.0)).step == 20, "no rule has ended the run"
    assert exported_check(rules, checks_of(4.0, 5.0, 7.0, 7.0)).step == 10
    assert exported_check(rules, checks_of(4.0, 7.0, 7.0)).step == 0, "the base model"


@pytest.mark.parametrize(("goal", "step"), [("max", 10), ("min", 30)])
def test_keep_best_chooses_among_sound_checks(goal: str, step: int) -> None:
    rules = settings({"metric": FRECHET, "above": 6.0}, keep_best={"metric": SHARE, "goal": goal})
    checks = checks_of(4.0, 5.0, 5.0, 5.0, 9.0, shares=(0.5, 0.7, 0.7, 0.4, 0.9 if goal == "max" else 0.1))
    assert exported_check(rules, checks[:4]).step == step, "also where no rule has ended the run"
    assert exported_check(rules, checks).step == step


def test_a_check_is_the_best_so_far_only_until_a_better_one() -> None:
    rules = settings(keep_best={"metric": FRECHET, "goal": "min"})
    values = (4.0, 5.0, 3.0, 3.0, 2.0)
    best = [best_check(rules, checks_of(*values[: length + 1])).step for length in range(5)]
    assert best == [0, 0, 20, 20, 40]


def test_a_rule_that_the_base_model_breaks_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"guard\.stop_when\.1.*guard/frechet_Flat 4, above 3"):
        require_sound_base(settings({"metric": SHARE, "above": 1}, {"metric": FRECHET, "above": 3}), checks_of(4.0)[0])
    with pytest.raises(ValueError, match=r"guard\.stop_when\.0.*is 0 for the base model"):
        require_sound_base(settings({"metric": FRECHET, "rises_by": 0.5}), checks_of(0.0)[0])
    require_sound_base(settings({"metric": FRECHET, "rises_by": 0.5}), checks_of(4.0)[0])


@pytest.mark.parametrize("bounds", [{}, {"rises_by": 0.1, "above": 3.0}, {"rises_by": -0.1}, {"over": 3.0}])
def test_a_rule_has_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        StopRuleConfig.model_validate({"metric": FRECHET} | bounds)
