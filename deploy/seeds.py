"""`make seeds`: the demo's two runs with seeds of their own, each compared with base and oracle, with intervals.

Six trainings as Ray jobs, one after the other, each followed by `srpo evaluate`: every gap closed with its bootstrap
interval over prompts. Resumable: a run that has its comparison is not made again (after a change of the embedded
models, delete outputs/tiny_srpo*). Writes seeds.json, the table of results/README.md, and the page of a blind viewing
of the first run, of which results/viewing holds the choices.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.bench_method.report import between
from deploy.demo import FORWARD, REVERSED, DemoError, at_our_services, train
from deploy.local import LocalServices
from deploy.settings import EXIT_INTERRUPTED, ROOT, LocalError, Settings, add_options, settings
from deploy.signals import end_as_interrupted
from services.clients.jobs import JobsError
from services.clients.reward import RewardError
from services.clients.run_folder import RunFolder
from services.clients.tracking import TrackingError
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.evaluation.paired import GAP_MEASURES, GAPS
from trainer.jobs.evaluate import evaluate

RESULTS = ROOT / "deploy" / "runs" / "results"
SEEDS = (1, 2, 3)
_SUBJECT, _DIVERSITY = "truth_subject_similarity", "diversity_prompts"
_KEPT = (*GAP_MEASURES, *GAPS, _SUBJECT, _DIVERSITY, "damage", "style_share_3D", "style_share_Flat")


def run_files(folder: Path) -> list[Path]:
    """Write the demo's run files with other seeds and names. Return their paths, directions in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in SEEDS:
        for file in (FORWARD, REVERSED):
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
            tree |= {"name": f"{tree['name']}_{seed}", "seed": seed}
            path = folder / f"{tree['name']}.yaml"
            path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
            paths.append(path)
    return paths


def make(services: LocalServices, files: Sequence[Path]) -> None:
    """Train and compare what has no comparison yet; always stop what was started."""
    started = []
    try:
        started = services.up()
        for number, file in enumerate(files, start=1):
            if is_made(file):
                continue
            print(f"\nrun {number} of {len(files)}", flush=True)
            config = train(services.settings, file).config
            evaluate(config, {"aligned": RunFolder.find(config.output_dir, config.name).path / "model"})
            shutil.copy(file, _comparison(config).with_name(file.name))
    finally:
        services.down(started)


def is_made(file: Path) -> bool:
    """Return whether the run, as its file is now, has been trained and compared."""
    made = _comparison(load_run_config(file)).with_name(file.name)
    return made.is_file() and made.read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


def summarize(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the numbers of each run: of base, oracle and aligned model, with intervals, and what the guard did."""
    rows = []
    for file in files:
        config = load_run_config(file)
        folder = RunFolder.find(config.output_dir, config.name).path
        numbers = json.loads(_comparison(config).read_text(encoding="utf-8"))
        kept = {
            policy: {name: values[name]["value"] for name in _KEPT if name in values}
            for policy, values in numbers.items()
        }
        difference = numbers["aligned"][_SUBJECT]["difference"]
        guard = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["guard"]
        words = config.control_words
        rows.append({"run": f"{words.positive} | {words.negative}", "seed": config.seed, **kept, "guard": guard})
        rows[-1]["subject_difference"] = difference
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = ["run, seed", "gap closed: L1", "edges", "SSIM", "hue", "subject similarity, base → aligned"]
    head += ["diversity, of the oracle's", "damage", "step taken", "alarm"]
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda each: (each["run"], each["seed"])):
        base, aligned, oracle = row["base"], row["aligned"], row["oracle"]
        gaps = [_cell(aligned.get(name)) for name in GAPS]
        change = row["subject_difference"]
        cells = [
            f"{row['run'].replace('|', chr(92) + '|')}, {row['seed']}",
            *gaps,
            f"{base[_SUBJECT]['value']:.3f} → {aligned[_SUBJECT]['value']:.3f} "
            f"({change['low']:+.3f} to {change['high']:+.3f})",
            f"{aligned[_DIVERSITY]['value'] / oracle[_DIVERSITY]['value']:.0%}",
            f"{aligned['damage']['value']:.2f}",
            str(row["guard"]["exported_step"]),
            row["guard"]["stopped_by"] or "none",
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(gap: dict[str, float] | None) -> str:
    """Return a gap closed with its interval; a dash where base and oracle are the same."""
    return "–" if gap is None else f"{gap['value']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})"


def write(rows: Sequence[dict[str, Any]], first: RunConfig) -> None:
    (RESULTS / "seeds.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    between(RESULTS / "README.md", "seeds", table(rows))
    viewing = RESULTS / "viewing"
    viewing.mkdir(exist_ok=True)
    for name in ("viewing.html", "viewing_key.json"):
        shutil.copy(_comparison(first).parent / name, viewing / name)


def _comparison(config: RunConfig) -> Path:
    return config.output_dir / config.name / "comparison" / "numbers.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs; return exit code 0, or 1 with what failed on stderr."""
    parser = argparse.ArgumentParser("deploy.seeds", description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    where: Settings = settings(parser.parse_args(arguments))
    try:
        where.run_dir.mkdir(parents=True, exist_ok=True)
        files = [at_our_services(where, file) for file in run_files(ROOT / "outputs" / "seeds")]
        make(LocalServices(where), files)
        rows = summarize(files)
    except (LocalError, ConfigError, JobsError, TrackingError, DemoError, RewardError, ValueError, OSError) as error:
        print(f"make seeds: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make seeds: interrupted; what it started is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    write(rows, load_run_config(files[0]))
    print(table(rows))
    return 0


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
