"""Write the measurements as JSON and as a table in Markdown, with the goals and whether they were reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bench_reward.measure import Comparison, Side
from deploy.bench_reward.memory import Growth

_BEGIN, _END = "<!-- bench-reward: written by make bench-reward -->", "<!-- bench-reward: end -->"


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal, reached if `value` is at least, or at most, `bound`."""

    what: str
    value: float
    bound: float
    is_lower_bound: bool

    @property
    def is_reached(self) -> bool:
        return self.value >= self.bound if self.is_lower_bound else self.value <= self.bound

    def line(self) -> str:
        sign = "≥" if self.is_lower_bound else "≤"
        return f"{'reached' if self.is_reached else 'MISSED '}  {self.what}: {self.value:.3g} ({sign} {self.bound:.3g})"


def speed_ratios(comparison: Comparison) -> list[float]:
    """Return ours over theirs in each round: other work on the machine slowed both."""
    return [ours / theirs for ours, theirs in zip(comparison.ours.per_s, comparison.theirs.per_s, strict=True)]


def speed_ratio(comparison: Comparison) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(speed_ratios(comparison))


def cpu_ratio(comparison: Comparison) -> float:
    return statistics.median(comparison.ours.cpu_s) / statistics.median(comparison.theirs.cpu_s)


def p99_s(side: Side) -> float:
    """Return the 99th percentile of the seconds of all rounds' requests."""
    ordered = sorted(side.seconds)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def single_goals(comparison: Comparison, num_callers: int) -> list[Goal]:
    p99_ratio = p99_s(comparison.ours) / p99_s(comparison.theirs)
    return [
        Goal(f"{comparison.what}: speed ratio", speed_ratio(comparison), 1.0 if num_callers == 1 else 1.5, True),
        Goal(f"{comparison.what}: p99 ratio", p99_ratio, 1.0, False),
    ]


def table(against_baseline: Sequence[Comparison], against_bare: Sequence[Comparison]) -> str:
    """Return medians over the rounds as Markdown, and of each ratio the lowest and highest, which show the noise."""
    lines = [
        "| one picture a request | service, images/s | Flask, images/s | ratio | p99, ms | CPU, ms an image |",
        "|---|---|---|---|---|---|",
    ]
    for each in against_baseline:
        ours, theirs = each.ours, each.theirs
        p99 = f"{1000 * p99_s(ours):.0f} / {1000 * p99_s(theirs):.0f}"
        both = f"{1000 * statistics.median(ours.cpu_s):.1f} / {1000 * statistics.median(theirs.cpu_s):.1f}"
        cpu = f"{both} ({cpu_ratio(each):.2f})"
        lines.append(f"| {each.what} | {_rates(each)} | {p99} | {cpu} |")
    lines += [
        "",
        "| batches of 8 pictures, 4 callers | service, images/s | bare model, images/s | ratio |",
        "|---|---|---|---|",
    ]
    lines += [f"| {each.what} | {_rates(each)} |" for each in against_bare]
    return "\n".join(lines)


def _rates(comparison: Comparison) -> str:
    ours, theirs = statistics.median(comparison.ours.per_s), statistics.median(comparison.theirs.per_s)
    ratios = speed_ratios(comparison)
    return f"{ours:.1f} | {theirs:.1f} | {speed_ratio(comparison):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def as_json(comparison: Comparison) -> dict[str, Any]:
    sides = {"ours": comparison.ours, "theirs": comparison.theirs}
    return {"what": comparison.what, "speed_ratio": round(speed_ratio(comparison), 4)} | {
        name: {
            "per_s": [round(each, 3) for each in side.per_s],
            "cpu_s": [round(each, 5) for each in side.cpu_s],
            "p99_s": round(p99_s(side), 4) if side.seconds else None,
            "num_requests": len(side.seconds),
        }
        for name, side in sides.items()
    }


def growth_goals(growth: Growth) -> list[Goal]:
    what = f"memory growth over {growth.num_requests} requests"
    return [
        Goal(f"{what}, replicas", growth.share("ServeReplica"), 0.02, False),
        Goal(f"{what}, all processes", growth.share(), 0.02, False),
    ]


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the two marker lines of a Markdown file. Raise ValueError if they are missing."""
    before, marker, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (marker and end):
        raise ValueError(f"{path} lacks the lines {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}", encoding="utf-8")
