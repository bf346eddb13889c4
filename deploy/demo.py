"""`make demo`: align the embedded model in two opposite directions and compare the results with the base model.

It starts the services, runs two Ray jobs one after the other (3D | Flat and, otherwise the same, Flat | 3D), compares
the pictures with real drawings and by judges that gave no gradient, and writes outputs/demo/summary.json with pictures
beside it. It always stops what it started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deploy.local import LocalServices
from deploy.process import OwnedProcess
from deploy.settings import EXIT_INTERRUPTED, ROOT, LocalError, Settings, add_options, settings
from deploy.signals import end_as_interrupted
from services.clients.jobs import Jobs, JobsError
from services.clients.run_folder import RunFolder
from services.clients.tracking import Tracker, TrackingError
from services.config.run import ConfigError, RunConfig, load_run_config

RUNS = ROOT / "deploy" / "runs"
FORWARD, REVERSED = RUNS / "tiny_srpo.yaml", RUNS / "tiny_srpo_reversed.yaml"
_GAPS = {
    "l1": "distance of pixels",
    "ssim": "structural similarity",
    "edge_correlation": "edges",
    "hue_distance": "hue",
}
_SHOWN = ("truth_", "gap_closed_", "style_share_", "frechet_", "subject_", "diversity_", "base_edge_correlation")
_LIBRARIES = ("ray", "torch", "diffusers", "transformers", "deepspeed", "mlflow")


class DemoError(RuntimeError):
    """A training of the demo failed; the text names it and where its output is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished training: its configuration, the evaluation.json it left, its seconds as a job, its page in MLflow."""

    config: RunConfig
    evaluation: dict[str, Any]
    seconds: float
    url: str

    @property
    def label(self) -> str:
        return f"{self.config.control_words.positive} | {self.config.control_words.negative}"

    @property
    def folder(self) -> Path:
        return RunFolder.find(self.config.output_dir, self.config.name).path


@dataclass(frozen=True, slots=True)
class Claim:
    """What a training should show, and whether it did."""

    run: str
    text: str
    is_met: bool


def demo(services: LocalServices, run_files: Sequence[Path], out_dir: Path) -> dict[str, Any]:
    """Run the demo and return the summary. Raise LocalError, JobsError or DemoError; always stop what was started."""
    began = time.monotonic()
    started: list[OwnedProcess] = []
    try:
        started = services.up()
        outcomes = [train(services.settings, file) for file in run_files]
    finally:
        services.down(started)
    summary = summarize(outcomes, services.seconds, time.monotonic() - began)
    write(summary, outcomes, out_dir)
    return summary


def train(where: Settings, run_file: Path) -> Outcome:
    """Submit one run as a Ray job, print its log, and read its results."""
    began = time.monotonic()
    config = load_run_config(at_our_services(where, run_file))
    jobs = Jobs(where.dashboard_url)
    words = config.control_words
    print(f"\n== {config.name}: more {words.positive}, less {words.negative} ==", flush=True)
    job_id = jobs.submit(where.run_dir / run_file.name)
    try:
        for piece in jobs.follow(job_id):
            print(piece, end="", flush=True)
    finally:
        status = jobs.end(job_id)
    if status != "SUCCEEDED":
        raise DemoError(f"{config.name}: job {job_id} {status}; its output is above")
    folder = RunFolder.find(config.output_dir, config.name).path
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    url = Tracker.latest(where.mlflow_url, config.tracking.experiment, config.name).url
    return Outcome(config, evaluation, time.monotonic() - began, url)


def at_our_services(where: Settings, run_file: Path) -> Path:
    """Write a copy of the run file with the services' addresses, which options can change."""
    tree = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    tree["reward_service"] = {**tree.get("reward_service", {}), "url": where.serve_url}
    tree["tracking"] = {**tree.get("tracking", {}), "uri": where.mlflow_url}
    copy = where.run_dir / run_file.name
    copy.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return copy


def summarize(outcomes: Sequence[Outcome], seconds_up: dict[str, float], seconds_total: float) -> dict[str, Any]:
    """Return every number of the tables, seconds by phase, versions, and the machine's cores."""
    seconds = {each.config.name: {"total": each.seconds, **each.evaluation["seconds"]} for each in outcomes}
    return {
        "num_images": outcomes[0].evaluation["num_images"],
        "runs": {each.label: _numbers(each.evaluation) for each in outcomes},
        "guards": {each.label: each.evaluation["guard"] for each in outcomes},
        "claims": [asdict(claim) for each in outcomes for claim in claims(each)],
        "seconds": {"services": seconds_up, **seconds, "total": seconds_total},
        "mlflow_runs": {each.label: each.url for each in outcomes},
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "num_cores": os.cpu_count(),
    }


def _numbers(evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of base, aligned model and, if it was drawn, oracle."""
    policies = [name for name in ("base", "aligned", "oracle") if name in evaluation]
    return {name: {key.removeprefix("eval/"): value for key, value in evaluation[name].items()} for name in policies}


def claims(outcome: Outcome) -> list[Claim]:
    """Check what the demo promises, the same in both directions, on subjects that the training has not seen.

    Most of it compares each picture with the real drawing of its subject in the wanted style: gap_closed is 0 for the
    base model and 1 for the base model that is told the style.
    """
    numbers, wanted = _numbers(outcome.evaluation), outcome.config.control_words.positive
    base, aligned, oracle = (numbers[name] for name in ("base", "aligned", "oracle"))
    share, subject, diversity = f"style_share_{wanted}", "truth_subject_similarity", "diversity_prompts"
    checks = {
        f"half of the gap closed in {text}": aligned.get(f"gap_closed_{name}", 0.0) >= 0.5
        for name, text in _GAPS.items()
    }
    checks |= {
        "subjects as close to their real drawings as before": aligned[subject] >= base[subject],
        "diversity at least 80 % of the oracle's": aligned[diversity] >= 0.8 * oracle[diversity],
        f"share of {wanted} raised": aligned[share] > base[share],
        "no alarm of the guard": outcome.evaluation["guard"]["stopped_by"] is None,
    }
    return [Claim(outcome.label, text, is_met) for text, is_met in checks.items()]


def write(summary: dict[str, Any], outcomes: Sequence[Outcome], out_dir: Path) -> None:
    """Write summary.json, before_after.png of the first training, and before_after_<name>.png of the others."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for index, outcome in enumerate(outcomes):
        suffix = f"_{outcome.config.name}" if index else ""
        shutil.copy(outcome.folder / "before_after.png", out_dir / f"before_after{suffix}.png")


def table(summary: dict[str, Any]) -> str:
    """Return a table for each run, a line for each number and a column for each model, and then the claims."""
    lines = []
    for label, policies in summary["runs"].items():
        lines += ["", f"{label + ':':26}" + "".join(f"{name:>10}" for name in policies)]
        for name in [name for name in policies["aligned"] if name.startswith(_SHOWN)]:
            cells = (f"{numbers[name]:10.3f}" if name in numbers else f"{'':10}" for numbers in policies.values())
            lines.append(f"{name:26}{''.join(cells)}")
    lines += ["", f"{summary['num_images']} pictures of subjects that no training saw; gap_closed: base 0, oracle 1"]
    lines += [f"{'met' if each['is_met'] else 'MISSED':8}{each['run']}: {each['text']}" for each in summary["claims"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return exit code 0, or 1 with what failed and what to do on stderr."""
    parser = argparse.ArgumentParser("deploy.demo", description=__doc__)
    add_options(parser)
    parser.add_argument("--out-dir", type=Path, default=ROOT / "outputs" / "demo", help="(%(default)s)")
    args = parser.parse_args(arguments)
    where = settings(args)
    try:
        summary = demo(LocalServices(where), (FORWARD, REVERSED), args.out_dir)
    except (LocalError, ConfigError, JobsError, TrackingError, DemoError) as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make demo: interrupted; what it started is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{table(summary)}\n\n{summary['seconds']['total']:.0f} s in all; {args.out_dir}/summary.json")
    print(f"pictures         {args.out_dir}/before_after.png")
    print("`make up` brings the services back:")
    for label, url in summary["mlflow_runs"].items():
        print(f"MLflow, {label:11}{url}")
    print(f"reward service   {where.serve_url}/docs")
    return 0


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
