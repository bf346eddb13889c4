"""When a guarded run ends, and which of its checks is the best: pure functions of the numbers measured so far.

`checks` is always in order of steps, and its first is the base model's (step 0). All workers hold the same checks and
so come to the same decision, in a fresh run and in a resumed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.config.run import GuardConfig, StopRuleConfig

# In a checkpoint's metrics: its own step where the guard found it the best so far, else -1. Ray Train keeps the
# checkpoints with the highest, and so the best one, for as long as the run lasts.
BEST_STEP = "best_step"


@dataclass(frozen=True, slots=True)
class Check:
    """What the guard measured after `step` optimiser steps.

    >>> Check(step=10, numbers={"guard/frechet_Flat": 3.4})
    """

    step: int
    numbers: Mapping[str, float]


def bound(rule: StopRuleConfig, base: float) -> float:
    """The value that the rule's metric must not pass, where it is `base` for the base model.

    >>> bound(StopRuleConfig(metric="guard/frechet_Flat", rises_by=0.5), base=4.0)
    6.0
    """
    if rule.rises_by is not None:
        return base + rule.rises_by * abs(base)
    if rule.falls_by is not None:
        return base - rule.falls_by * abs(base)
    return float(rule.above if rule.above is not None else rule.below)  # type: ignore[arg-type]  # one bound is given


def is_violated(rule: StopRuleConfig, checks: Sequence[Check], check: Check) -> bool:
    """Whether `check` is beyond the rule's bound, however often that is still borne."""
    value, limit = check.numbers[rule.metric], bound(rule, checks[0].numbers[rule.metric])
    return value > limit if rule.is_upper else value < limit


def broken_rule(guard: GuardConfig, checks: Sequence[Check]) -> str | None:
    """The rule that ends the run now, with its numbers: its last `num_checks` checks are all beyond the bound."""
    for rule in guard.stop_when:
        last = checks[-rule.num_checks :]
        if len(last) == rule.num_checks and all(is_violated(rule, checks, check) for check in last):
            return _told(rule, checks, last)
    return None


def best_check(guard: GuardConfig, checks: Sequence[Check]) -> Check:
    """Of the checks at which no rule is violated: the best by `keep_best`, without it the last."""
    sound = [check for check in checks if not any(is_violated(rule, checks, check) for rule in guard.stop_when)]
    if guard.keep_best is None:
        return sound[-1]
    metric, sign = guard.keep_best.metric, 1 if guard.keep_best.goal == "max" else -1
    return max(sound, key=lambda check: sign * check.numbers[metric])  # the earliest of equals


def exported_check(guard: GuardConfig, checks: Sequence[Check]) -> Check:
    """Whose weights a finished run gives: the last check's where no rule ended it and no best one is asked for."""
    if guard.keep_best is None and broken_rule(guard, checks) is None:
        return checks[-1]
    return best_check(guard, checks)


def require_sound_base(guard: GuardConfig, base: Check) -> None:
    """Raise ValueError for a rule that means nothing for this base model: a run under it could not even begin."""
    for index, rule in enumerate(guard.stop_when):
        value, key = base.numbers[rule.metric], f"guard.stop_when.{index}"
        if rule.is_relative and value == 0:
            raise ValueError(f"{key}: {rule.metric} is 0 for the base model: give above or below, not a share of it")
        if is_violated(rule, [base], base):
            raise ValueError(f"{key}: the base model is beyond it: {rule.metric} {value:.4g}, {rule.told}")


def _told(rule: StopRuleConfig, checks: Sequence[Check], last: Sequence[Check]) -> str:
    base, steps = checks[0].numbers[rule.metric], ", ".join(str(check.step) for check in last)
    values = ", ".join(f"{check.numbers[rule.metric]:.4g}" for check in last)
    return f"{rule.metric} {values} at step {steps}: {rule.told} (base {base:.4g}, bound {bound(rule, base):.4g})"
