"""`make bench-method`: sweep learning rates, run the best of each method on several seeds, ablate; resumable.

    python -m deploy.bench_method                    all stages, then the table
    python -m deploy.bench_method sweep final        these stages
    python -m deploy.bench_method report             table, numbers and pictures from the finished runs
    python -m deploy.bench_method --plan FILE --out FOLDER …

A finished run is a file in outputs/bench_method and is not run again while the plan asks for the same. Processes run
two at a time, one thread each; CPU-seconds are a process's own, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.bench_method.plan import (
    Plan,
    Task,
    ablation_task,
    base_of,
    base_task,
    default_task,
    final_task,
    hacking_task,
    load_plan,
    sweep_task,
)
from deploy.bench_method.report import default_text, guards_text, write_report
from deploy.bench_method.results import Result, Row, best_learning_rate
from deploy.settings import ROOT

PLAN = ROOT / "deploy" / "bench_method" / "plan.yaml"
STAGES = ("sweep", "final", "default", "ablate", "hack", "report")


class BenchError(RuntimeError):
    """A run of the comparison failed; the text names it and its log."""


class Bench:
    """Run tasks that have no result yet, num_processes at a time."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        out.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        plan = self.plan
        tasks = [base_task(plan, plan.validation_path, plan.sweep_seed)]
        tasks += [sweep_task(plan, each, rate) for each in plan.methods for rate in plan.learning_rates_of(each)]
        self._run("sweep", tasks)

    def final(self) -> None:
        plan = self.plan
        tasks = [base_task(plan, plan.test_path, seed) for seed in plan.seeds]
        for seed in plan.seeds:  # all methods of one seed first: a table that stops early is still fair
            tasks += [final_task(plan, each, self.learning_rate(each.name), seed) for each in plan.methods]
        self._run("final", tasks)

    def default(self) -> None:
        self._run("default", [default_task(self.plan, seed) for seed in self.plan.seeds])

    def ablate(self) -> None:
        plan, rate = self.plan, self.learning_rate(self.plan.ablated)
        tasks = [base_task(plan, plan.validation_path, seed) for seed in plan.ablation_seeds]
        tasks += [ablation_task(plan, each, rate, seed) for seed in plan.ablation_seeds for each in plan.ablations]
        self._run("ablate", tasks)

    def hack(self) -> None:
        plan = self.plan
        tasks = [hacking_task(plan, seed) for seed in plan.seeds]
        self._run("hack", [*(base_of(plan, task) for task in tasks), *tasks])

    def report(self) -> None:
        """Write tables, numbers and pictures from the finished runs; rows without runs say so."""
        plan, validation = self.plan, self.plan.validation_path
        methods = [Row.of("base", None, [self.result(base_task(plan, plan.test_path, seed)) for seed in plan.seeds])]
        for each in plan.methods:
            rate = self.learning_rate(each.name)
            runs = [self.result(final_task(plan, each, rate, seed)) for seed in plan.seeds]
            methods.append(Row.of(each.name, rate, runs))
        sweep = [Row.of("base", None, [self.result(base_task(plan, validation, plan.sweep_seed))])]
        sweep += [
            Row.of(each.name, rate, [self.result(sweep_task(plan, each, rate))])
            for each in plan.methods
            for rate in plan.learning_rates_of(each)
        ]
        seeds, rate = plan.ablation_seeds, self.learning_rate(plan.ablated)
        ablations = [Row.of("base", None, [self.result(base_task(plan, validation, seed)) for seed in seeds])]
        ablations += [
            Row.of(
                each.name,
                (each.learning_rates or (rate,))[0],
                [self.result(ablation_task(plan, each, rate, seed)) for seed in seeds],
            )
            for each in plan.ablations
        ]
        published = next(row for row in methods if row.label == plan.published)
        default = Row.of("default", None, [self.result(default_task(plan, seed)) for seed in plan.seeds])
        runs = [self.result(hacking_task(plan, seed)) for seed in plan.seeds]
        hacking = Row.of(plan.hacking.name, plan.hacking.learning_rates[0], runs)
        stages = {
            "methods": methods,
            "sweep": sweep,
            "ablations": ablations,
            "default": [default],
            "hacking": [hacking],
        }
        texts = {"guards": self._guards(methods), "default": default_text(published, default)}
        write_report(plan, stages, texts, self.out)

    def _guards(self, methods: Sequence[Row]) -> str:
        plan = self.plan
        hacking = []
        for seed in plan.seeds:
            run = self.result(hacking_task(plan, seed))
            if run is None or run.base is None:
                return "Not run."
            hacking.append((run.base, run))
        bases = {each.seed: each for each in methods[0].results}
        healthy = [(bases[each.seed], each) for row in methods[1:] for each in row.results if each.seed in bases]
        return guards_text(hacking, healthy, plan)

    def learning_rate(self, method: str) -> float:
        """Return the best learning rate of the sweep. Raise BenchError if a run of it is missing."""
        plan, variant = self.plan, self.plan.method(method)
        tasks = [sweep_task(plan, variant, rate) for rate in plan.learning_rates_of(variant)]
        swept = [self.result(task) for task in tasks]
        if None in swept:
            raise BenchError(f"the sweep of {method} is not complete: run the stage sweep first")
        return best_learning_rate([each for each in swept if each is not None])

    def result(self, task: Task) -> Result | None:
        """Return the task's result beside its base's, or None if the task as it is now, or its base's, was not run."""
        file = self.out / f"{task.name}.json"
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        try:
            is_same = Task.model_validate(found["task"]) == task  # keys that are newer than the run have their defaults
        except ValidationError:
            is_same = False
        if not is_same or task.config.evaluation.draws_oracle:  # a base's own task
            return Result(found) if is_same else None
        base = self.result(base_of(self.plan, task))
        return base and Result(found, base)

    def _run(self, stage: str, tasks: Iterable[Task]) -> None:
        missing = [task for task in tasks if self.result(task) is None]
        began = time.monotonic()
        with ThreadPoolExecutor(self.plan.num_processes) as pool:
            running = {pool.submit(self._train, task): task for task in missing}
            try:
                for count, done in enumerate(as_completed(running), start=1):
                    seconds = time.monotonic() - began
                    left = seconds / count * (len(missing) - count)
                    line = done.result().summary
                    print(f"{stage} {count}/{len(missing)}, {left / 60:.0f} min left: {line}", flush=True)
            finally:
                for future in running:
                    future.cancel()

    def _train(self, task: Task) -> Result:
        """Run one task in a process. Raise BenchError with the end of its log."""
        if (known := self.result(task)) is not None:  # of another driver, meanwhile
            return known
        task_file, log = self.out / f"{task.name}.task", self.out / f"{task.name}.log"
        task_file.write_text(task.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "deploy.bench_method.one_run", str(task_file), str(self.out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w", encoding="utf-8") as stream:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False)
        result = self.result(task) if code.returncode == 0 else None
        if result is None:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise BenchError(f"{task.name} failed ({code.returncode}), see {log}: {' '.join(last)}")
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named stages; return exit code 0, or 1 with what failed on stderr."""
    parser = argparse.ArgumentParser("deploy.bench_method", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench_method")
    args = parser.parse_args(arguments)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {sorted(unknown)[0]!r}: take {', '.join(STAGES)}")
    bench = Bench(load_plan(args.plan), args.out.resolve())
    stages = {
        "sweep": bench.sweep,
        "final": bench.final,
        "default": bench.default,
        "ablate": bench.ablate,
        "hack": bench.hack,
    }
    wanted = args.stages or STAGES
    try:
        for name, stage in stages.items():
            if name in wanted:
                stage()
        if "report" in wanted:
            bench.report()
    except (BenchError, ValueError) as error:
        print(f"make bench-method: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
