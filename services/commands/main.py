"""The command `srpo`: run and submit trainings, draw samples, score pictures, try control words.

    srpo run RUN.yaml                      train in the foreground
    srpo submit RUN.yaml                   train as a Ray job and follow it
    srpo embed RUN.yaml                    encode its prompts before it trains, as a Ray job
    srpo evaluate RUN.yaml [MODEL …]       compare with the base model, as a Ray job
    srpo encode RUN.yaml                   a dataset's images into latents, as a Ray job
    srpo jobs | srpo stop JOB              what runs on the cluster, and an end to it
    srpo steer RUN --positive … --negative …
                                           change what a running training maximises
    srpo sample MODEL --prompt … -o FILE   draw with a model
    srpo score IMAGE… --prompt … --positive … --negative …
                                           the relative reward of pictures
    srpo rank-words IMAGE… --prompt … --words …
                                           which control words would move the reward on these pictures

It starts programs (`python -m trainer.…`) and asks services; it holds no tensors and imports no trainer. A mistake of
the caller ends in one line that names the thing and the cure, and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from services.clients.jobs import DEFAULT_ADDRESS, Jobs, JobsError
from services.clients.reward import RewardClient, RewardError
from services.commands.rank_words import try_words
from services.commands.score import score_files
from services.commands.word_effects import TrialError
from services.config.rewards import RewardServiceConfig
from services.config.run import ConfigError, TrackingConfig, load_run_config
from services.config.steering import SteeringError
from services.contract import ContractError

_PROGRAMS = {  # that take a run file and are Ray jobs
    "submit": "trainer.launch",
    "evaluate": "trainer.jobs.evaluate",
    "embed": "trainer.jobs.encode_prompts",
    "encode": "trainer.jobs.encode_images",
}
_EXIT_INTERRUPTED = 130  # as shells have it
_NUM_FIRST_ATTEMPTS = 2  # somebody is waiting, and is told soon that the service is not there
_DEFAULT_REWARD_URL = RewardServiceConfig.model_fields["url"].default
_DEFAULT_TRACKING_URI = TrackingConfig.model_fields["uri"].default


class UsageError(ValueError):
    """The command line asks for what cannot be; the text names the argument and the cure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a mistake or failure named on stderr, 2 for a command line that cannot be parsed."""
    args, rest = _parser().parse_known_args(arguments)
    if rest and args.command != "sample":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _dispatch(args, rest)
    except (UsageError, ConfigError, ContractError, JobsError, RewardError, TrialError) as error:
        print(f"srpo {args.command}: {error}", file=sys.stderr)
        return 1


def _dispatch(args: argparse.Namespace, rest: list[str]) -> int:
    match args.command:
        case "run":
            load_run_config(args.run)  # a typing mistake shows at once, not after the imports of the trainer
            _become("trainer.launch", str(args.run))
        case "submit" | "embed" | "evaluate" | "encode":
            return submit(args.command, args.run, getattr(args, "models", ()), args.address)
        case "jobs" | "stop":
            return list_jobs(Jobs(args.address)) if args.command == "jobs" else stop_job(Jobs(args.address), args.job)
        case "steer":
            return _steer(args)
        case "sample":
            _become("trainer.jobs.sample", *rest)
        case "score" | "rank-words":
            verb = score_files if args.command == "score" else try_words
            reward = _reward(args)
            with RewardClient(args.url) as client:
                return verb(args, client, reward)
    raise AssertionError(args.command)


def submit(command: str, run_file: Path, arguments: Sequence[str], address: str) -> int:
    """Submit the command's program as a Ray job, and follow it. Ctrl-C ends only the following: the job goes on."""
    config = load_run_config(run_file)
    if command == "encode" and config.dataset is None:
        raise UsageError(f"{run_file} has no dataset, so that there is nothing to encode")
    jobs, num_gpus = Jobs(address), int(command == "evaluate" and config.engine.use_gpu)
    return follow(jobs, jobs.submit(run_file.absolute(), arguments, _PROGRAMS[command], num_gpus))


def follow(jobs: Jobs, job_id: str) -> int:
    """Print what the job prints, until it ends."""
    print(f"job {job_id} (Ctrl-C leaves it running; `srpo stop {job_id}` ends it)", flush=True)
    try:
        for piece in jobs.follow(job_id):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on")
        return _EXIT_INTERRUPTED
    status = jobs.status(job_id)
    print(f"job {job_id}: {status}")
    return 0 if status == "SUCCEEDED" else 1


def list_jobs(jobs: Jobs) -> int:
    """One line a job: id, status, run file."""
    for job in jobs.list():
        print(f"{job.id}  {job.status:9}  {job.run}")
    return 0


def stop_job(jobs: Jobs, job_id: str) -> int:
    jobs.stop(job_id)
    return 0


def _steer(args: argparse.Namespace) -> int:
    from services.clients.tracking import TrackingError
    from services.commands.steer import steer_run  # on use: MLflow takes seconds to import

    try:
        return steer_run(args)
    except (SteeringError, TrackingError) as error:
        raise UsageError(error) from error


def _reward(args: argparse.Namespace) -> str:
    """The one that is asked for. Raises RewardError, soon, where no service answers, whatever was asked for."""
    with RewardClient(args.url, max_attempts=_NUM_FIRST_ATTEMPTS) as client:
        names = sorted(client.models())
    if args.reward:
        return str(args.reward)
    if len(names) != 1:
        raise UsageError(f"{args.url} serves several rewards: choose one with --reward: {', '.join(names)}")
    return names[0]


def _become(module: str, *arguments: str) -> NoReturn:
    """Replace this process, so that signals and the exit code are the program's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("srpo", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train in the foreground, on the cluster at RAY_ADDRESS or on one of its own")
    submit = commands.add_parser("submit", help="train as a Ray job and follow it")
    embed = commands.add_parser("embed", help="encode a run's prompts before it trains, as a Ray job")
    evaluate = commands.add_parser("evaluate", help="compare models with a run's base model, as a Ray job")
    encode = commands.add_parser("encode", help="a dataset's images into latents for training, as a Ray job")
    jobs = commands.add_parser("jobs", help="list the cluster's jobs")
    stop = commands.add_parser("stop", help="stop a job")
    for command in (run, submit, embed, evaluate, encode):
        command.add_argument("run", type=Path, metavar="RUN.yaml", help="see deploy/runs/")
    evaluate.add_argument("models", nargs="*", metavar="[NAME=]FOLDER", help="a model or checkpoint (the run's model)")
    for command in (submit, embed, evaluate, encode, jobs, stop):
        command.add_argument("--address", default=DEFAULT_ADDRESS, help="the cluster's dashboard (%(default)s)")
    stop.add_argument("job", metavar="JOB", help="as `srpo jobs` lists it")
    commands.add_parser("sample", add_help=False, help="draw with a model: srpo sample MODEL --prompt TEXT -o FILE")
    _add_steer(commands.add_parser("steer", help="change what a running training maximises, from its next step on"))
    score = commands.add_parser("score", help="the relative reward of pictures")
    rank_words = commands.add_parser("rank-words", help="which control words would move the reward on given pictures")
    _add_score(score)
    _add_rank_words(rank_words)
    for command in (score, rank_words):
        command.add_argument("--reward", help="the reward's name at the service; needed if it serves several")
        command.add_argument("--url", default=_DEFAULT_REWARD_URL, help="the reward service (%(default)s)")
        command.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    return parser


def _add_steer(steer: argparse.ArgumentParser) -> None:
    steer.add_argument("run", metavar="RUN", help="the name or id of a run that is training, as MLflow has it")
    steer.add_argument("--positive", metavar="WORD", help="control word that is wanted from now on")
    steer.add_argument("--negative", metavar="WORD", help="control word that is to be avoided from now on")
    steer.add_argument("--preference-scale", type=float, metavar="K", help="k at all levels, in place of the schedules")
    steer.add_argument("--weights", metavar="NAME=NUMBER,…", help="of the run's rewards")
    steer.add_argument("--reset", action="store_true", help="go back to all that the run file says")
    steer.add_argument("--tracking-uri", default=_DEFAULT_TRACKING_URI, metavar="URI", help="(%(default)s)")
    steer.epilog = "What is not given is as in the run file, whatever was asked before."


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or WebP; - reads file names from stdin")
    score.add_argument("--prompt", required=True, help="what the images show, without control words")
    score.add_argument("--positive", required=True, help="control word that is wanted, such as 3D")
    score.add_argument("--negative", required=True, help="control word that is to be avoided, such as Flat")
    score.add_argument("--preference-scale", type=float, default=0.0, help="k in (1 + k)·positive − negative (0)")


def _add_rank_words(rank_words: argparse.ArgumentParser) -> None:
    rank_words.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP; six at least")
    rank_words.add_argument("--prompt", help="what all images show, without control words")
    rank_words.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line: of each image, or to draw")
    rank_words.add_argument("--model", help="draw the images from --prompts with it: a folder, or a hub id")
    rank_words.add_argument("--num-images", type=int, default=24, help="how many of the prompts to draw (%(default)s)")
    rank_words.add_argument("--words", nargs="+", default=[], metavar="WORD", help="candidate control words")
    rank_words.add_argument("--words-file", type=Path, metavar="FILE", help="more of them, one a line")
    against = rank_words.add_mutually_exclusive_group()
    against.add_argument("--negative", help="rank each word against this one, not against meaningless words")
    against.add_argument("--pairs", action="store_true", help="rank every two words against each other")


if __name__ == "__main__":
    sys.exit(main())
