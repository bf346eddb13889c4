"""The verb `srpo checkpoints`: list the checkpoints of a run, with what their manifests say."""

from __future__ import annotations

import argparse
import json
from datetime import datetime

from services.clients.checkpoint_store import CheckpointStore, Manifest, checkpoint_location
from services.clients.run_folder import LATEST, RunFolder
from services.commands.usage import add_run_file, add_set
from services.config.run import load_run_config

_HEADINGS = ("step", "written", "size", "workers", "reward", "guard", "place")
_SHOWN_REWARDS = ("reward_denoise", "reward", "reward_invert")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo checkpoints`."""
    add_run_file(parser)
    add_set(parser)
    parser.add_argument("--run", dest="run_id", default=LATEST, metavar="RUN_ID", help="which run (%(default)s)")
    parser.add_argument("--check", action="store_true", help="read every file and compare it with its sum")
    parser.add_argument("--json", action="store_true", help="print each manifest as a line of JSON")
    parser.set_defaults(handler=_list)


def _list(args: argparse.Namespace) -> int:
    """Print a line a checkpoint. Return 1 if one is damaged."""
    config = load_run_config(args.run, args.set)
    run = RunFolder.find(config.output_dir, config.name, args.run_id)
    store = CheckpointStore(checkpoint_location(config, run))
    manifests = store.manifests()
    damaged = {each.folder: damage for each in manifests if args.check and (damage := store.damage(each))}
    if args.json:
        for each in manifests:
            print(json.dumps({"folder": each.folder, "bytes": _size(each), **each.facts}))
    else:
        print(f"run {run.id}: {len(manifests)} checkpoints in {store.location}")
        rows = [_HEADINGS, *(_row(each) for each in manifests)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for folder, damage in damaged.items():
        print(f"damaged: {folder}: {damage}")
    return 1 if damaged else 0


def _row(manifest: Manifest) -> tuple[str, ...]:
    facts = manifest.facts
    numbers = facts.get("numbers", {})
    reward = next((f"{numbers[name]:.4f}" for name in _SHOWN_REWARDS if name in numbers), "")
    checks = facts.get("guard") or []
    guard = (
        ", ".join(f"{name.removeprefix('guard/')} {value:.4g}" for name, value in checks[-1]["numbers"].items())
        if checks
        else ""
    )
    return (
        f"{manifest.step}{' best' if facts.get('is_best') else ''}",
        f"{datetime.fromtimestamp(facts.get('time', 0)):%Y-%m-%d %H:%M:%S}",
        f"{_size(manifest) / 2**20:.1f} MiB",
        str(facts.get("num_workers", "")),
        reward,
        guard,
        manifest.folder,
    )


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files)
