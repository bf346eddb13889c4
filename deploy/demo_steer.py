"""`make demo-steer`: turn a training half way with `srpo steer`, and draw the curve by a judge that gives no gradient.

It starts the services, runs one Ray job (deploy/runs/steer.yaml), runs `srpo steer` after half of the steps, and draws
OUT/steer.json and OUT/steer.png from what MLflow has recorded. It always stops what it started.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import PIL.Image

from deploy.demo import RUNS, DemoError, at_our_services
from deploy.local import LocalServices
from deploy.process import OwnedProcess
from deploy.settings import EXIT_INTERRUPTED, ROOT, LocalError, Settings, add_options, settings
from deploy.signals import end_as_interrupted
from services.clients.jobs import Jobs, JobsError
from services.clients.tracking import Tracker, TrackingError
from services.commands import main as cli
from services.config.run import ConfigError, RunConfig, load_run_config

RUN = RUNS / "steer.yaml"
_SHARES = ("guard/style_share_3D", "guard/style_share_Flat")
_VERSION = "steering_version"


def demo(services: LocalServices, out_dir: Path) -> dict[str, Any]:
    """Run the demo. Raise LocalError, JobsError, TrackingError or DemoError; always stop what was started."""
    started: list[OwnedProcess] = []
    try:
        started = services.up()
        config = load_run_config(at_our_services(services.settings, RUN))
        train(services.settings, config)
        return record(Tracker.latest(config.tracking.uri, config.tracking.experiment, config.name), config, out_dir)
    finally:
        services.down(started)


def train(where: Settings, config: RunConfig) -> None:
    """Submit the run, follow it, and steer it when its log says that half of its steps are done."""
    jobs = Jobs(where.dashboard_url)
    job_id = jobs.submit(where.run_dir / RUN.name)
    half, printed, is_steered = f"step {config.num_steps // 2}/{config.num_steps}", "", False
    try:
        for piece in jobs.follow(job_id):
            print(piece, end="", flush=True)
            printed += piece
            if half in printed and not is_steered:
                steer(config)
                is_steered = True
    finally:
        status = jobs.end(job_id)
    if status != "SUCCEEDED":
        raise DemoError(f"{config.name}: job {job_id} {status}; its output is above")


def steer(config: RunConfig) -> None:
    """Run `srpo steer steer --positive Flat --negative 3D`: the run file's words, reversed."""
    words = config.control_words
    pair = ["--positive", words.negative, "--negative", words.positive]
    print("$ srpo", *(command := ["steer", config.name, *pair]), flush=True)
    if cli.main([*command, "--tracking-uri", config.tracking.uri]) != 0:
        raise DemoError("the run could not be steered; the reason is above")


def record(tracker: Tracker, config: RunConfig, out_dir: Path) -> dict[str, Any]:
    """Write steer.json and steer.png from the run's metrics and pictures."""
    histories = {name: tracker.history(name) for name in (*_SHARES, _VERSION)}
    steered = [step for step, version in histories[_VERSION].items() if version > 0]
    if not steered:
        raise DemoError(f"the run ended before it was steered: {tracker.url}")
    words = config.control_words
    summary = {
        "words": {"before": [words.positive, words.negative], "after": [words.negative, words.positive]},
        "first_steered_step": min(steered),
        "num_images_per_check": config.guard and config.guard.num_prompts * config.guard.num_images_per_prompt,
        "curves": histories,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "steer.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(tracker.images("samples", Path(folder)).items())
        grids = {step: PIL.Image.open(file).copy() for step, file in files}
    draw(summary, grids, out_dir / "steer.png")
    return summary


def draw(summary: dict[str, Any], grids: dict[int, PIL.Image.Image], path: Path) -> None:
    """Draw the curves with the turn marked, and below them the policy's pictures at the start, the turn and the end."""
    heights = [3.6, *(9 * grid.height / grid.width + 0.2 for grid in grids.values())]  # in inches
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", dpi=90
    )
    turn = summary["first_steered_step"]
    for name, color in zip(_SHARES, ("tab:orange", "tab:blue"), strict=True):
        curve = summary["curves"][name]
        axes[0].plot(list(curve), list(curve.values()), marker="o", color=color, label=name.rpartition("_")[2])
    axes[0].axvline(turn - 1, color="gray", linestyle="--")
    before, after = (" | ".join(summary["words"][when]) for when in ("before", "after"))
    axes[0].text(turn - 2, 1.02, f"{before}  (version 0)", ha="right", color="gray")
    axes[0].text(turn, 1.02, f"{after}  (version 1, from step {turn})", ha="left", color="gray")
    axes[0].set(xlabel="steps taken", ylabel="share by the judge", ylim=(0, 1))
    axes[0].legend(loc="center left")
    for axis, (step, grid) in zip(axes[1:], grids.items(), strict=True):
        axis.imshow(grid)
        axis.set_title(f"after {step} steps", fontsize=10, loc="left")
        axis.axis("off")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return exit code 0, or 1 with what failed and what to do on stderr."""
    parser = argparse.ArgumentParser("deploy.demo_steer", description=__doc__)
    add_options(parser)
    parser.add_argument("--out-dir", type=Path, default=ROOT / "outputs" / "demo_steer", help="(%(default)s)")
    args = parser.parse_args(arguments)
    try:
        demo(LocalServices(settings(args)), args.out_dir)
    except (LocalError, ConfigError, JobsError, TrackingError, DemoError) as error:
        print(f"make demo-steer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make demo-steer: interrupted; what it started is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"{args.out_dir}/steer.png and steer.json")
    return 0


if __name__ == "__main__":
    end_as_interrupted()
    sys.exit(main())
