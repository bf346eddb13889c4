"""What several verbs of the command share: the error for a wrong command line, and the choice of a reward."""

from __future__ import annotations

import argparse
from pathlib import Path

from services.clients.reward import RewardClient
from services.config.rewards import RewardServiceConfig

_NUM_FIRST_ATTEMPTS = 2  # a person is waiting, and should soon read that the service is not there
_DEFAULT_REWARD_URL = RewardServiceConfig.model_fields["url"].default


class UsageError(ValueError):
    """The command line asks for something impossible; the text names the argument and what to do."""


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN.yaml, which becomes `args.run`."""
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="a run file, such as those in deploy/runs/")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add --resume and --set, which `launch_arguments` reads."""
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="RUN_ID",
        help="go on with a run, by default the latest of this name; `auto` begins one if there is none",
    )
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, which changes keys of the run file."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the run file, as in num_steps=80; may be repeated",
    )


def launch_arguments(args: argparse.Namespace) -> list[str]:
    """Return the command line's --resume and --set for trainer.launch."""
    resume = [] if args.resume is None else ["--resume", args.resume]
    return resume + [part for change in args.set for part in ("--set", change)]


def add_reward_options(parser: argparse.ArgumentParser) -> None:
    """Add --reward, --url and --json."""
    parser.add_argument("--reward", help="the reward's name in the service; needed if it serves several")
    parser.add_argument("--url", default=_DEFAULT_REWARD_URL, help="address of the reward service (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line in place of a table")


def choose_reward(args: argparse.Namespace) -> str:
    """Return the name of the reward to use: --reward, or else the only one served.

    Raise RewardError soon if no service answers, and UsageError if a choice is needed.
    """
    with RewardClient(args.url, max_attempts=_NUM_FIRST_ATTEMPTS) as client:
        names = sorted(client.models())
    if args.reward:
        return str(args.reward)
    if len(names) != 1:
        raise UsageError(f"{args.url} serves several rewards: choose one with --reward: {', '.join(names)}")
    return names[0]
