"""Run the matrix of faults, and write deploy/runs/results/faults.md.

    make faults                                    the rows that are not done yet
    python -m deploy.faults "killed: a worker"     some rows anew, whose names begin so

A row that is done is kept in outputs/faults/rows.json; delete that folder after a change. The page names the rows that
are not done.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deploy.faults.matrix import FAULTS, Fault
from deploy.faults.outcome import Outcome, describe, outcome, table
from deploy.faults.stage import Stage, open_stage
from deploy.faults.training import Training
from deploy.settings import ROOT
from deploy.signals import end_as_interrupted

RESULTS = ROOT / "deploy" / "runs" / "results" / "faults.md"
KEPT = ROOT / "outputs" / "faults" / "rows.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every row passed."""
    parser = argparse.ArgumentParser("deploy.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows, by the beginning of their names")
    names = parser.parse_args(arguments).names
    done = _kept()
    chosen = [fault for fault in FAULTS if _is_named(fault, names) or not (names or fault.name in done)]
    references: dict[int, Training] = {}
    with open_stage() as stage:
        for number, fault in enumerate(chosen, start=1):
            print(f"\n== {number} of {len(chosen)}: {fault.name} ==", flush=True)
            done[fault.name] = run(stage, fault, references)
            print(describe(done[fault.name]), flush=True)
            shares = shares_of_a_step(references[min(references)])
            _keep(done, shares)
    RESULTS.write_text(table([fault.name for fault in FAULTS], done, _kept_shares()), encoding="utf-8")
    failed = [fault.name for fault in chosen if not done[fault.name].is_passed]
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} rows passed", *failed, sep="\nfailed: ")
    return 1 if failed else 0


def _is_named(fault: Fault, names: Sequence[str]) -> bool:
    return any(fault.name.startswith(name) for name in names)


def _kept() -> dict[str, Outcome]:
    """Return the rows that earlier calls have run, by name."""
    rows = json.loads(KEPT.read_text(encoding="utf-8"))["rows"] if KEPT.exists() else []
    return {
        row["name"]: Outcome(**row | {"said": tuple(row["said"]), "complaints": tuple(row["complaints"])})
        for row in rows
    }


def _kept_shares() -> dict[str, float]:
    shares: dict[str, float] = json.loads(KEPT.read_text(encoding="utf-8"))["shares"]
    return shares


def _keep(done: Mapping[str, Outcome], shares: Mapping[str, float]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    tree = {"rows": [asdict(each) for each in done.values()], "shares": shares}
    KEPT.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def run(stage: Stage, fault: Fault, references: dict[int, Training]) -> Outcome:
    """Run one row. It is compared with the undisturbed training of as many steps, which is run when first needed."""
    num_steps = int(fault.changes.get("num_steps", 8))
    if num_steps not in references:
        reference = references[num_steps] = Training(stage, f"undisturbed_{num_steps}", {"num_steps": num_steps})
        reference.start()
        reference.finish()
        print(describe(outcome("undisturbed", reference, None, ())), flush=True)
    training, reference = Training(stage, fault.name, fault.changes), references[num_steps]
    try:
        fault.act(stage, training)
        return outcome(
            fault.name,
            training,
            reference,
            fault.says,
            same_weights=fault.same_weights,
            max_repeated=fault.max_repeated,
        )
    except Exception as error:  # noqa: BLE001  # a row that fails must not keep the others from being run
        traceback.print_exc()
        complaint = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Outcome(fault.name, 0, training.seconds, 0.0, 0, 0, None, (), (complaint,))
    finally:
        training.stop_if_running()


def shares_of_a_step(training: Training) -> dict[str, float]:
    """Return what a checkpoint and the record of a step cost the training thread of worker 0, as shares of a step."""
    file = training.folder.path / "evaluation.json"
    seconds: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["seconds"]
    step = seconds["steps"] / training.config.num_steps
    num_checkpoints = 1 + training.config.num_steps // training.config.checkpoint.every_num_steps
    return {
        "checkpoint": seconds["checkpoints"] / num_checkpoints / step,
        "record": seconds["record"] / training.config.num_steps / step,
    }


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
