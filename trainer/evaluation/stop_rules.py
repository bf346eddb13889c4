"""Decide from the guard's checks whether a run must end, and which check is the best: pure functions, no state.

`checks` is always in order of steps and begins with the base model's (step 0). All workers hold the same checks, so all
decide alike, in a fresh run and in a resumed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.config.evaluation import GuardConfig, StopRuleConfig

# A key of a checkpoint's metrics: its own step if the guard found it the best so far, else -1. Ray Train keeps the
# checkpoints with the highest values, so the best one lasts as long as the run.
BEST_STEP = "best_step"


@dataclass(frozen=True, slots=True)
class Check:
    """The numbers that the guard measured after `step` optimizer steps.

    >>> Check(step=10, numbers={"guard/frechet_Flat": 3.4})
    """

    step: int
    numbers: Mapping[str, float]


def bound(rule: StopRuleConfig, base: float) -> float:
    """Return the value that the rule's metric must not pass, given the base model's value `base`.

    >>> bound(StopRuleConfig(metric="guard/frechet_Flat", rises_by=0.5), base=4.0)
    6.0
    """
    if rule.rises_by is not None:
        return base + rule.rises_by * abs(base)
    if rule.falls_by is not None:
        return base - rule.falls_by * abs(base)
    return float(rule.above if rule.above is not None else rule.below)  # type: ignore[arg-type]  # one bound is given


def is_violated(rule: StopRuleConfig, checks: Sequence[Check], check: Check) -> bool:
    """Return whether `check` is beyond the rule's bound, regardless of the rule's num_checks."""
    value, limit = check.numbers[rule.metric], bound(rule, checks[0].numbers[rule.metric])
    return value > limit if rule.is_upper else value < limit


def broken_rule(settings: GuardConfig, checks: Sequence[Check]) -> str | None:
    """Return the rule that ends the run now, as text with its numbers, or None.

    A rule ends the run if its last `num_checks` checks are all beyond the bound.
    """
    for rule in settings.stop_when:
        last = checks[-rule.num_checks :]
        if len(last) == rule.num_checks and all(is_violated(rule, checks, check) for check in last):
            return _describe(rule, checks, last)
    return None


def best_check(settings: GuardConfig, checks: Sequence[Check]) -> Check:
    """Return the best check by `keep_best`, or the last one without it, among those at which no rule is violated."""
    sound = [check for check in checks if not any(is_violated(rule, checks, check) for rule in settings.stop_when)]
    if settings.keep_best is None:
        return sound[-1]
    metric, sign = settings.keep_best.metric, 1 if settings.keep_best.goal == "max" else -1
    return max(sound, key=lambda check: sign * check.numbers[metric])  # of equals, the earliest


def exported_check(settings: GuardConfig, checks: Sequence[Check]) -> Check:
    """Return the check whose weights a finished run exports.

    It is the last check if no rule ended the run and `keep_best` is not set, else the best one.
    """
    if settings.keep_best is None and broken_rule(settings, checks) is None:
        return checks[-1]
    return best_check(settings, checks)


def require_sound_base(settings: GuardConfig, base: Check) -> None:
    """Raise ValueError for a rule that the base model already breaks, or whose relative bound is a share of 0."""
    for index, rule in enumerate(settings.stop_when):
        value, key = base.numbers[rule.metric], f"guard.stop_when.{index}"
        if rule.is_relative and value == 0:
            raise ValueError(f"{key}: {rule.metric} is 0 for the base model: give above or below, not a share of it")
        if is_violated(rule, [base], base):
            raise ValueError(f"{key}: the base model is beyond it: {rule.metric} {value:.4g}, {rule.summary}")


def _describe(rule: StopRuleConfig, checks: Sequence[Check], last: Sequence[Check]) -> str:
    base, steps = checks[0].numbers[rule.metric], ", ".join(str(check.step) for check in last)
    values = ", ".join(f"{check.numbers[rule.metric]:.4g}" for check in last)
    return f"{rule.metric} {values} at step {steps}: {rule.summary} (base {base:.4g}, bound {bound(rule, base):.4g})"
