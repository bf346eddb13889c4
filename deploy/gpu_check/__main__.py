"""`make gpu-check`: run all stages on one GPU in under eight minutes, and write a JSON file of each and a summary.

    python3 -m deploy.gpu_check --packages .gpu                     all, on the first GPU
    python3 -m deploy.gpu_check --device cpu --size tiny            does it work at all?
    python3 -m deploy.gpu_check --packages .gpu --stages kernels    one of them

It needs Python 3.12 and torch 2.11 and imports nothing else before the packages that travel along are unpacked.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.gpu_check.packages import VECTORS, PackagesError, unpack
from deploy.gpu_check.stages import LIMITS_S, Deadline, is_good, run_all, write_tree

_ROOT = Path(__file__).resolve().parents[2]
_MINUTES = 7.75


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 0 if every stage came to its end and kept its limits, else 1."""
    args = _parser().parse_args(arguments)
    if args.stage is not None:
        return _one_stage(args)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        paths = [str(_ROOT)] if args.packages is None else [str(unpack(args.packages)), str(_ROOT)]
    except PackagesError as error:
        print(f"make gpu-check: {error}", file=sys.stderr)
        return 1
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "deploy.gpu_check", "--device", args.device, "--size", args.size]
    command += ["--out", str(args.out)] + (["--packages", str(args.packages)] if args.packages else [])
    commands = {name: [*command, "--stage", name] for name in args.stages}
    deadline = Deadline(started + args.minutes * 60)
    results = run_all(args.stages, commands, args.out, deadline, environment, LIMITS_S)
    machines = [each["results"]["machine"] for each in results.values() if "machine" in each.get("results", {})]
    summary = {
        "machine": machines[0] if machines else None,
        "size": args.size,
        "seconds": round(time.monotonic() - started, 1),
        "is_good": all(map(is_good, results.values())),
        "stages": results,
    }
    write_tree(args.out / "gpu.json", summary)
    card = summary["machine"]["card"] if summary["machine"] else "no stage could start"
    print(f"{card}: {summary['seconds']:.0f} s, written to {args.out / 'gpu.json'}")
    return 0 if summary["is_good"] else 1


def _one_stage(args: argparse.Namespace) -> int:
    import torch  # now that the packages are on PYTHONPATH

    from deploy.gpu_check.sizes import SIZES
    from deploy.gpu_check.stage import run_stage

    vectors = [] if args.packages is None else sorted((args.packages / VECTORS).glob("*.safetensors"))
    run_stage(args.stage, SIZES[args.size], torch.device(args.device), args.out / f"{args.stage}.json", vectors)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("deploy.gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument(
        "--size", default="full", choices=["full", "tiny"], help="FLUX.1-dev and ViT-H, or toys of them"
    )
    parser.add_argument("--packages", type=Path, help="the folder of `make gpu-wheels`; without it, what is installed")
    parser.add_argument("--out", type=Path, default=_ROOT / "outputs" / "gpu_check", help="where the files are written")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S), metavar="STAGE")
    parser.add_argument("--stage", choices=list(LIMITS_S), help=argparse.SUPPRESS)  # in this process
    return parser


if __name__ == "__main__":
    sys.exit(main())
