"""`make bench-reward`: the service against Flask and against the bare model, in interleaved rounds, about 17 minutes.

    python -m deploy.bench_reward            writes deploy/runs/results/reward.json and the table beside it
    python -m deploy.bench_reward --quick    one short round of everything, writes nothing: does it work?
    python -m deploy.bench_reward --memory   only what 10,000 requests leave in memory, process by process

Run it on a quiet machine: all sides and the callers share its cores. A missed goal is in the table; the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.bench_reward import report
from deploy.bench_reward.bare import bare_model
from deploy.bench_reward.load import BenchError
from deploy.bench_reward.measure import Bench, Comparison
from deploy.bench_reward.memory import Growth, memory_growth
from deploy.bench_reward.models import embedded, large
from deploy.bench_reward.servers import NUM_PROCESSES, baseline, service
from deploy.settings import EXIT_INTERRUPTED, ROOT, LocalError
from deploy.signals import end_as_interrupted

TABLES = ROOT / "deploy" / "runs" / "results" / "README.md"
RESULT = ROOT / "deploy" / "runs" / "results" / "reward.json"
CALLERS = (1, 8, 32)
PAIR_CALLERS = (8, 32)
_ROUNDS = 5, 1  # the second: quick
# Before the first reading of memory, and after it; the second: quick. The replicas' two stores of 16 MiB are full after
# 2500 answers, of which every fourth is a gradient of 49 KB, or some more where one replica gets fewer.
WARM_UP = 4000, 50
_REQUESTS = 10_000, 200
_started = time.monotonic()


class Measured:
    """The measurements of one model."""

    def __init__(self, name: str, is_large: bool) -> None:
        self._is_large = is_large  # the size that the goals on batches and on CPU time are set for
        self.single = {callers: Comparison(f"{name}, {callers} caller{'s' * (callers > 1)}") for callers in CALLERS}
        self.unseen = Comparison(f"{name}, 8 callers, unseen texts")
        self.pair = {
            callers: Comparison(f"{name}, {callers} callers, a pair against two requests") for callers in PAIR_CALLERS
        }
        self.forward = Comparison(f"{name}, forward")
        self.gradient = Comparison(f"{name}, forward and backward")

    @property
    def against_baseline(self) -> list[Comparison]:
        return [*self.single.values(), self.unseen, *self.pair.values()]

    @property
    def against_bare(self) -> list[Comparison]:
        return [self.forward, self.gradient]

    def goals(self) -> list[report.Goal]:
        goals = [goal for callers, each in self.single.items() for goal in report.single_goals(each, callers)]
        if self._is_large:
            goals += [
                report.Goal(f"{each.what}: share of the bare model's speed", report.speed_ratio(each), 0.85, True)
                for each in self.against_bare
            ]
            pair = self.pair[PAIR_CALLERS[-1]]  # the baseline forms no batches, however many call
            goals.append(report.Goal(f"{pair.what}: CPU ratio", report.cpu_ratio(pair), 1 / 3, False))
        return goals


def bench_reward(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Make all measurements. Raise BenchError or LocalError."""
    load = os.getloadavg()[0]
    say(f"load average {load:.2f}" + (": the machine is not quiet, do not quote what follows" if load > 0.5 else ""))
    models = [embedded(is_quick), large(folder / "vit-b32", is_quick)]
    folders = {model.name: model.folder for model in models}
    with ExitStack() as stack:
        bares = [stack.enter_context(bare_model(model.folder, NUM_PROCESSES, model.size_px)) for model in models]
        flask = stack.enter_context(baseline(folder, folders))
        serve = stack.enter_context(service(folder, folders))
        benches = [Bench(model, serve, flask, bare) for model, bare in zip(models, bares, strict=True)]
        measured = in_rounds(benches, _ROUNDS[is_quick])
        growth = memory_growth(serve, models[0], WARM_UP[is_quick], _REQUESTS[is_quick])
    goals = [goal for each in measured for goal in each.goals()] + report.growth_goals(growth)
    return {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load_before": round(load, 2)},
        "versions": {name: version(name) for name in ("torch", "ray", "gunicorn", "transformers")},
        "processes": NUM_PROCESSES,
        "against_flask": [report.as_json(comparison) for each in measured for comparison in each.against_baseline],
        "against_bare_model": [report.as_json(comparison) for each in measured for comparison in each.against_bare],
        "memory_bytes": asdict(growth),
        "goals": [asdict(goal) | {"is_reached": goal.is_reached, "line": goal.line()} for goal in goals],
        "table": report.table(
            [comparison for each in measured for comparison in each.against_baseline],
            [comparison for each in measured for comparison in each.against_bare],
        ),
    }


def in_rounds(benches: Sequence[Bench], num_rounds: int) -> list[Measured]:
    """Run each bench in turn, in every round. Raise BenchError."""
    measured = [Measured(bench.model.name, is_large=bench is benches[-1]) for bench in benches]
    for bench in benches:
        bench.check_same_answers()
        warm_up(bench)
    for number in range(1, num_rounds + 1):
        for bench, into in zip(benches, measured, strict=True):
            for line in one_round(bench, into):
                say(f"round {number} of {num_rounds}, {line}")
    return measured


def bench_memory(folder: Path, is_quick: bool) -> Growth:
    """Measure what many requests leave in memory. Raise BenchError or LocalError."""
    model = embedded(is_quick)
    with service(folder, {model.name: model.folder}) as serve:
        return memory_growth(serve, model, WARM_UP[is_quick], _REQUESTS[is_quick])


def warm_up(bench: Bench) -> None:
    """Load, allocate and cache everything before the clock starts."""
    nowhere = Comparison(f"warm-up of {bench.model.name}")
    bench.fill_text_caches()
    say(bench.single(8, nowhere))
    for with_gradient in (False, True):
        bench.batches(with_gradient, nowhere)


def one_round(bench: Bench, into: Measured) -> Iterator[str]:
    for num_callers, comparison in into.single.items():
        yield bench.single(num_callers, comparison)
    yield bench.unseen_texts(into.unseen)
    for num_callers, comparison in into.pair.items():
        yield bench.pair_cost(num_callers, comparison)
    yield bench.batches(False, into.forward)
    yield bench.batches(True, into.gradient)


def say(line: str) -> None:
    print(f"[{time.monotonic() - _started:4.0f} s] {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 0, 1 with what failed on stderr, or 130 after an interrupt."""
    parser = argparse.ArgumentParser("deploy.bench_reward", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, nothing is written")
    parser.add_argument("--memory", action="store_true", help="only the memory, nothing is written")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="srpo-bench-") as folder:
        try:
            if args.memory:
                growth = bench_memory(Path(folder), args.quick)
                print("\n".join(["", growth.table(), "", *(goal.line() for goal in report.growth_goals(growth))]))
                return 0
            result = bench_reward(Path(folder), args.quick)
        except (BenchError, LocalError, TimeoutError) as error:
            print(f"make bench-reward: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("make bench-reward: interrupted; what it started is stopped", file=sys.stderr)
            return EXIT_INTERRUPTED
    print("\n" + result["table"] + "\n")
    print("\n".join(goal["line"] for goal in result["goals"]))
    if not args.quick:
        write(result)
    return 0


def write(result: dict[str, Any]) -> None:
    """Write the JSON file, and the table into the results' README."""
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    machine = result["machine"]
    how = (
        f"Medians of {_ROUNDS[False]} rounds in which the sides took turns, in brackets the lowest and highest ratio; "
        f"{machine['cpus']} CPU cores shared with the callers, load average {machine['load_before']} before. "
        "p99 and CPU: the service, then Flask."
    )
    report.write_between_markers(TABLES, f"{how}\n\n{result['table']}")
    print(f"written to {RESULT} and {TABLES}")


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
