"""The command `srpo`: run and submit trainings, draw samples, score an image.

    srpo run RUN.yaml                      train in the foreground
    srpo submit RUN.yaml                   train as a Ray job and follow it
    srpo jobs | srpo stop JOB              what runs on the cluster, and an end to it
    srpo sample MODEL --prompt … -o FILE   draw with a model
    srpo score IMAGE --prompt … --positive … --negative …

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

import numpy as np
from PIL import Image, UnidentifiedImageError

from services.config import ConfigError, RewardConfig, load_run_config
from services.contract import ContractError, Float32, PromptPair, RewardRequest, WeightedReward
from services.jobs import DEFAULT_ADDRESS, Jobs, JobsError
from services.reward_client import RewardClient, RewardError

_EXIT_INTERRUPTED = 130  # as shells have it
_DEFAULT_REWARD_URL = RewardConfig.model_fields["url"].default


class UsageError(ValueError):
    """The command line asks for what cannot be; the text names the argument and the cure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a mistake or failure named on stderr, 2 for a command line that cannot be parsed."""
    args, rest = _parser().parse_known_args(arguments)
    if rest and args.command != "sample":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _dispatch(args, rest)
    except (UsageError, ConfigError, ContractError, JobsError, RewardError) as error:
        print(f"srpo {args.command}: {error}", file=sys.stderr)
        return 1


def _dispatch(args: argparse.Namespace, rest: list[str]) -> int:
    match args.command:
        case "run":
            load_run_config(args.run)  # a typing mistake shows at once, not after the imports of the trainer
            _become("trainer.launch", str(args.run))
        case "submit":
            return submit(args.run, args.address)
        case "jobs":
            return list_jobs(Jobs(args.address))
        case "stop":
            Jobs(args.address).stop(args.job)
            return 0
        case "sample":
            _become("trainer.sample", *rest)
        case "score":
            with RewardClient(args.url, max_attempts=2) as client:
                return score(args, client)
    raise AssertionError(args.command)


def submit(run_file: Path, address: str) -> int:
    """Submit and follow. Ctrl-C ends only the following: the job goes on."""
    load_run_config(run_file)
    jobs = Jobs(address)
    job_id = jobs.submit(run_file.absolute())
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


def score(args: argparse.Namespace, client: RewardClient) -> int:
    """Print the relative reward of an image: its similarity to the prompt under one control word, less the other."""
    pair = PromptPair(prompt=args.prompt, positive=args.positive, negative=args.negative)
    image = _read_image(args.image)
    name = args.reward or _only_reward(client)
    rewards = (WeightedReward(name),)
    response = client.score(RewardRequest(image, (pair,), (args.preference_scale,), rewards, with_gradient=False))
    print(f"reward    {response.rewards[0]:+.4f}   {name}, {response.scorers[0]}")
    print(f"positive  {response.positive_similarities[0, 0]:+.4f}   {pair.positive_text}")
    print(f"negative  {response.negative_similarities[0, 0]:+.4f}   {pair.negative_text}")
    return 0


def _read_image(path: Path) -> Float32:
    """(1, 3, height, width) in [0, 1]; transparency is laid on white, as the pictures of the embedded default are."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except UnidentifiedImageError as error:
        raise UsageError(f"{path} is not an image that can be read: give a PNG, JPEG or WebP file") from error
    except OSError as error:
        raise UsageError(f"cannot read image {path}: {error.strerror or error}") from error
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(flat, np.float32).transpose(2, 0, 1)[None] / np.float32(255)


def _only_reward(client: RewardClient) -> str:
    names = sorted(client.models())
    if len(names) != 1:
        raise UsageError(f"{client.url} serves several rewards: choose one with --reward: {', '.join(names)}")
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
    jobs = commands.add_parser("jobs", help="list the cluster's jobs")
    stop = commands.add_parser("stop", help="stop a job")
    for command in (run, submit):
        command.add_argument("run", type=Path, metavar="RUN.yaml", help="see deploy/runs/")
    for command in (submit, jobs, stop):
        command.add_argument("--address", default=DEFAULT_ADDRESS, help="the cluster's dashboard (%(default)s)")
    stop.add_argument("job", metavar="JOB", help="as `srpo jobs` lists it")
    commands.add_parser("sample", add_help=False, help="draw with a model: srpo sample MODEL --prompt TEXT -o FILE")
    _add_score(commands.add_parser("score", help="the relative reward of one image"))
    return parser


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("image", type=Path, metavar="IMAGE")
    score.add_argument("--prompt", required=True, help="what the image shows, without control words")
    score.add_argument("--positive", required=True, help="control word that is wanted, such as 3D")
    score.add_argument("--negative", required=True, help="control word that is to be avoided, such as Flat")
    score.add_argument("--preference-scale", type=float, default=0.0, help="k in (1 + k)·positive − negative (0)")
    score.add_argument("--reward", help="the reward's name at the service; needed if it serves several")
    score.add_argument("--url", default=_DEFAULT_REWARD_URL, help="the reward service (%(default)s)")


if __name__ == "__main__":
    sys.exit(main())
