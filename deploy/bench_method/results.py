"""Compute from runs' numbers: the best learning rate, broken rules, means and standard errors over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from services.config.evaluation import StopRuleConfig
from trainer.evaluation.paired import GAPS, gaps_closed
from trainer.evaluation.stop_rules import Check, is_violated

_IN_TIME = 0.25  # of the final drift


@dataclass(frozen=True, slots=True)
class Result:
    """A run's file, as one_run.py writes it."""

    found: dict[str, Any]
    base: Result | None = None  # of the same prompts and seed

    @property
    def wanted(self) -> str:
        return str(self.found["task"]["config"]["control_words"]["positive"])

    @property
    def name(self) -> str:
        return str(self.found["task"]["name"])

    @property
    def seed(self) -> int:
        return int(self.found["task"]["config"]["seed"])

    @property
    def learning_rate(self) -> float:
        return float(self.found["task"]["config"]["optimizer"]["learning_rate"])

    @property
    def is_whole(self) -> bool:
        """Tell whether the run reached its end."""
        return self.found["error"] is None

    def check(self, index: int = -1) -> dict[str, float]:
        """Return the numbers of one check, by default the last one, with its CPU-seconds and steps."""
        return self.checks[index]

    @property
    def checks(self) -> list[dict[str, float]]:
        """Return the numbers of all checks, in order; beside a base, where they stand between it and its oracle."""
        return [
            {**numbers, **self._gaps(numbers), "cpu_s": check["cpu_s"], "num_steps": check["num_steps"]}
            for check in self.found["checks"]
            for numbers in [check["numbers"]]
        ]

    def _gaps(self, numbers: dict[str, float]) -> dict[str, float]:
        if self.base is None:
            return {}
        found = (self.base.found["checks"][-1]["numbers"], numbers, self.base.found["oracle"])
        gaps = gaps_closed(
            *({name: torch.tensor(value, dtype=torch.float64) for name, value in each.items()} for each in found)
        )
        return {name: float(gap) for name, gap in gaps.items()} | {
            "oracle_diversity_share": numbers["diversity_prompts"] / self.base.found["oracle"]["diversity_prompts"]
        }

    @property
    def mean_gap_closed(self) -> float:
        """Return the mean of the four gaps closed at the end."""
        last = self.check()
        return fmean(last[name] for name in GAPS)

    @property
    def summary(self) -> str:
        if not self.is_whole:
            return f"{self.name} broke down: {self.found['error']}"
        last = self.check()
        return (
            f"{self.name} {last['num_steps']} steps, {last['cpu_s']:.0f} CPU-s: L1 {last['truth_l1']:.4f}, "
            f"{self.wanted} {last[f'style_share_{self.wanted}']:.0%}, damage {last['damage']:.2f}"
        )


def best_learning_rate(swept: Sequence[Result]) -> float:
    """Return the learning rate with the largest mean gap closed. Raise ValueError if all runs failed."""
    whole = [each for each in swept if each.is_whole]
    if not whole:
        raise ValueError(f"every learning rate failed: {[each.summary for each in swept]}")
    return max(whole, key=lambda each: each.mean_gap_closed).learning_rate


def broken_rules(base: Result, result: Result, rules: Sequence[StopRuleConfig]) -> list[tuple[int, StopRuleConfig]]:
    """Return the index of each check that breaks a rule, and the rule, as the guard of a run would find them."""
    found = [base.found["checks"][-1], *result.found["checks"]]
    checks = [_as_the_guard_sees(check, result.wanted) for check in found]
    return [
        (index, rule) for index, check in enumerate(checks[1:]) for rule in rules if is_violated(rule, checks, check)
    ]


def is_in_time(base: Result, result: Result, index: int, number: str) -> bool:
    """Tell whether the check at `index` comes before a quarter of the rise of `number` until the end.

    A run whose number does not rise has no drift that a check could come before.
    """
    first, then, last = (each[number] for each in (base.check(), result.check(index), result.check()))
    return last > first and then - first < _IN_TIME * (last - first)


def _as_the_guard_sees(check: dict[str, Any], wanted: str) -> Check:
    numbers = check["numbers"] | {"frechet_wanted": check["numbers"][f"frechet_{wanted}"]}
    return Check(check["num_steps"], {f"guard/{name}": number for name, number in numbers.items()})


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over seeds and its standard error, which is None for one seed.

    >>> Estimate.of([0.5, 0.7]).as_text(percent=True)
    '60 ± 10 %'
    """

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(fmean(values), error)

    def as_text(self, *, percent: bool = False, digits: int = 0) -> str:
        factor, unit = (100, " %") if percent else (1, "")
        spread = "" if self.error is None else f" ± {factor * self.error:.{digits}f}"
        return f"{factor * self.mean:.{digits}f}{spread}{unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: runs that differ only in their seed. `num_wanted`: how many there should be."""

    label: str
    learning_rate: float | None  # None: not trained
    results: Sequence[Result]
    num_wanted: int
    trouble: str = "not run"  # why there are no results

    @classmethod
    def of(cls, label: str, learning_rate: float | None, runs: Sequence[Result | None]) -> Row:
        whole = [run for run in runs if run is not None and run.is_whole]
        broken = [run for run in runs if run is not None and not run.is_whole]
        return cls(label, learning_rate, whole, len(runs), "broke down" if broken else "not run")

    @property
    def is_short(self) -> bool:
        return 0 < len(self.results) < self.num_wanted

    def estimate(self, number: str, check: int = -1) -> Estimate:
        return Estimate.of([each.check(check)[number] for each in self.results])
