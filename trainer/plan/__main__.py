"""The program of `srpo plan`: print what a run needs, without a GPU and without loading weights.

    srpo plan RUN.yaml [--set KEY=VALUE] [--accelerator h100] [--mfu 0.4] [--gpus-per-host 8] [--configs FOLDER]

Exit code 0 if the run fits or nothing is known to compare with, 1 if it does not fit or cannot be planned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from services.config.run import ConfigError, load_run_config
from trainer.plan.accelerators import ACCELERATORS
from trainer.plan.advice import advice
from trainer.plan.checkpoint_configs import PlanError
from trainer.plan.here import GPUS_PER_HOST, plan_of
from trainer.plan.seconds import DEFAULT_MFU, cost_if_known
from trainer.plan.table import plan_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    args = _parser().parse_args(arguments)
    try:
        config = load_run_config(args.run, args.set)
        plan = plan_of(config, args.accelerator, args.gpus_per_host, args.configs)
        cost = cost_if_known(plan, args.mfu)
        print(plan_text(plan, cost, args.mfu, advice(plan) if plan.fits is False else ()))
    except (ConfigError, PlanError, ValueError, OSError) as error:
        print(f"srpo plan: {error}", file=sys.stderr)
        return 1
    return int(plan.fits is False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("srpo plan", description="Say what a run needs: memory, FLOPs, seconds, disk.")
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="a run file, such as those in deploy/runs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run file")
    names = ", ".join(ACCELERATORS)
    parser.add_argument("--accelerator", metavar="NAME", help=f"the GPU to plan for, of a run with use_gpu: {names}")
    parser.add_argument(
        "--mfu", type=_share, default=DEFAULT_MFU, help="assumed share of the peak FLOP/s (%(default)s)"
    )
    parser.add_argument("--gpus-per-host", type=int, default=GPUS_PER_HOST, metavar="N", help="(%(default)s)")
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="the model's config.json files, if it is absent")
    return parser


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"--mfu must be above 0 and at most 1, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
