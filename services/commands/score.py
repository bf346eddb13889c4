"""`srpo score`: print the reward of each picture file, as a table or as JSON lines.

A file that cannot be read or is refused is named on stderr, and the others go on. Without a service all ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.clients.reward import RewardClient, RewardRejected, RewardUnauthorized
from services.commands.usage import add_reward_options, choose_reward
from services.contract import ContractError, PromptPair, RewardRequest, RewardResponse, WeightedReward
from services.pictures import read_picture

_NUM_CALLERS = 8  # requests at once: the service scores in one batch what comes together
_STDIN = "-"


Outcome = RewardResponse | ContractError | RewardRejected


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo score`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or WebP; - reads file names from stdin")
    parser.add_argument("--prompt", required=True, help="what the images show, without control words")
    parser.add_argument("--positive", required=True, help="the control word that is wanted, such as 3D")
    parser.add_argument("--negative", required=True, help="the control word that is to be avoided, such as Flat")
    parser.add_argument("--preference-scale", type=float, default=0.0, help="k in (1 + k)·positive − negative (0)")
    add_reward_options(parser)
    parser.set_defaults(handler=_score)


def _score(args: argparse.Namespace) -> int:
    """Return 0, or 1 if any file failed. Raise ContractError for a bad word, RewardError for the service."""
    reward = choose_reward(args)
    pair = PromptPair(prompt=args.prompt, positive=args.positive, negative=args.negative)
    paths, num_failed = list(_paths(args.images)), 0
    if not args.json:
        print(f"{reward}: {pair.positive_text!r} against {pair.negative_text!r}\n reward  positive  negative  image")
    with RewardClient(args.url) as client, ThreadPoolExecutor(_NUM_CALLERS) as callers:
        outcomes = callers.map(lambda path: _score_file(client, path, pair, args.preference_scale, reward), paths)
        for path, outcome in zip(paths, outcomes, strict=True):
            if isinstance(outcome, RewardResponse):
                print(_json_line(path, outcome) if args.json else _row(path, outcome), flush=True)
            else:
                print(f"srpo score: {path}: {outcome}", file=sys.stderr)
                num_failed += 1
    return 1 if num_failed else 0


def _score_file(client: RewardClient, path: Path, pair: PromptPair, scale: float, reward: str) -> Outcome:
    """Return the service's answer, or what is wrong with this file. Raise RewardError for what concerns all files."""
    try:
        image = read_picture(path)
        return client.score(RewardRequest((image,), (pair,), (scale,), (WeightedReward(reward),), with_gradient=False))
    except RewardUnauthorized:
        raise
    except (ContractError, RewardRejected) as error:
        return error


def _paths(names: Iterable[str]) -> Iterator[Path]:
    """Yield the paths; `-` stands for the names on stdin, one a line."""
    for name in names:
        yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip()) if name == _STDIN else (Path(name),)


def _row(path: Path, response: RewardResponse) -> str:
    positive, negative = response.positive_similarities[0, 0], response.negative_similarities[0, 0]
    return f"{response.rewards[0]:+.4f}   {positive:+.4f}   {negative:+.4f}   {path}"


def _json_line(path: Path, response: RewardResponse) -> str:
    return json.dumps(
        {
            "image": str(path),
            "reward": float(response.rewards[0]),
            "positive_similarity": float(response.positive_similarities[0, 0]),
            "negative_similarity": float(response.negative_similarities[0, 0]),
            "scorer": response.scorers[0],
            "request_id": response.request_id,
        }
    )
