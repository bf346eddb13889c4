"""The command `srpo`: start trainings and other jobs, steer them, and use models and the reward service.

    srpo run RUN.yaml [--resume] [--set KEY=VALUE]
                                           train in the foreground, or go on with a training
    srpo plan RUN.yaml [--accelerator h100]
                                           say what a run needs: memory, FLOPs, seconds, disk
    srpo submit RUN.yaml                   train as a Ray job and follow it
    srpo encode-prompts RUN.yaml           encode a run's prompts before it trains, as a Ray job
    srpo encode-images RUN.yaml            encode the images of a run's dataset, as a Ray job
    srpo evaluate RUN.yaml [MODEL …]       compare models with the base model, as a Ray job
    srpo checkpoints RUN.yaml              list a run's checkpoints
    srpo jobs | srpo stop JOB              list the cluster's jobs; stop one
    srpo steer RUN --positive … --negative …
                                           change what a running training maximizes
    srpo sync RUN                          bring to MLflow what a run recorded while MLflow was away
    srpo sample MODEL --prompt … -o FILE   draw pictures with a model
    srpo score IMAGE… --prompt … --positive … --negative …
                                           print the reward of pictures
    srpo rank-words IMAGE… --prompt … --words …
                                           print which control words could change the reward on these pictures
    srpo viewing KEY CHOICES…              count the choices of a blind viewing

It starts programs (`python -m trainer.…`) and calls services; it imports neither torch nor the trainer. A mistake of
the caller ends with exit code 1 and one line that names what is wrong and what to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from services.clients.checkpoint_store import CheckpointError
from services.clients.jobs import JobsError
from services.clients.reward import RewardError
from services.clients.run_folder import RunFolderError
from services.commands import checkpoints, jobs, rank_words, score, steer, sync, viewing
from services.commands.usage import UsageError, add_resume, add_run_file, launch_arguments
from services.commands.word_effects import TrialError
from services.config.run import ConfigError, load_run_config
from services.config.steering import SteeringError
from services.contract import ContractError

_MISTAKES = (
    UsageError, ConfigError, ContractError, JobsError, RewardError, SteeringError, TrialError, RunFolderError,
    CheckpointError,
)  # fmt: skip
_WITH_OWN_OPTIONS = ("plan", "sample")  # read by the program that the verb becomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a mistake or failure named on stderr, 2 for a command line that cannot be read."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command not in _WITH_OWN_OPTIONS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return int(args.handler(args))
    except _MISTAKES as error:
        print(f"srpo {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("srpo", description="Align text-to-image models with a reward.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train in the foreground, on the cluster at RAY_ADDRESS or on one of its own")
    add_run_file(run)
    add_resume(run)
    run.set_defaults(handler=_run)
    plan = commands.add_parser("plan", add_help=False, help="say what a run needs: memory, FLOPs, seconds, disk")
    plan.set_defaults(handler=_plan)
    for verb in jobs.JOB_VERBS:
        jobs.configure_job(commands.add_parser(verb.name, aliases=verb.old_names, help=verb.help), verb)
    checkpoints.configure(commands.add_parser("checkpoints", help="list the checkpoints of a run"))
    jobs.configure_jobs(commands.add_parser("jobs", help="list the cluster's jobs"))
    jobs.configure_stop(commands.add_parser("stop", help="stop a job"))
    steer.configure(commands.add_parser("steer", help="change what a running training maximizes from its next step on"))
    sync.configure(commands.add_parser("sync", help="bring to MLflow what a run recorded while MLflow was away"))
    sample = commands.add_parser("sample", add_help=False, help="draw: srpo sample MODEL --prompt TEXT -o FILE")
    sample.set_defaults(handler=_sample)
    score.configure(commands.add_parser("score", help="print the reward of pictures"))
    rank_words.configure(
        commands.add_parser("rank-words", help="print which control words could change the reward on given pictures")
    )
    viewing.configure(commands.add_parser("viewing", help="count the choices of a blind viewing"))
    return parser


def _run(args: argparse.Namespace) -> NoReturn:
    load_run_config(args.run, args.set)  # reports a mistake at once, not after the imports of the trainer
    _become("trainer.launch", str(args.run), *launch_arguments(args))


def _plan(args: argparse.Namespace) -> NoReturn:
    _become("trainer.plan", *args.rest)


def _sample(args: argparse.Namespace) -> NoReturn:
    _become("trainer.jobs.sample", *args.rest)


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process, so that signals and the exit code are the program's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    sys.exit(main())
