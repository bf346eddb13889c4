"""`srpo score`: picture files in, a reward for each out, as a table or as JSON lines.

A file that cannot be read or is refused is named on stderr and the others go on; a service that is gone ends it all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.clients.reward import RewardClient, RewardRejected, RewardUnauthorized
from services.contract import ContractError, PromptPair, RewardRequest, RewardResponse, WeightedReward
from services.pictures import read_picture

_NUM_CALLERS = 8  # requests at once: the service scores in one batch what comes together
_STDIN = "-"


def score_files(args: argparse.Namespace, client: RewardClient, reward: str) -> int:
    """Exit code 0, or 1 if any file failed. Raises ContractError for the words, RewardError for the service."""
    pair = PromptPair(prompt=args.prompt, positive=args.positive, negative=args.negative)

    def score(path: Path) -> RewardResponse | ContractError | RewardRejected:
        try:
            image = read_picture(path)
            request = RewardRequest((image,), (pair,), (args.preference_scale,), (WeightedReward(reward),), False)
            return client.score(request)
        except RewardUnauthorized:
            raise
        except (ContractError, RewardRejected) as error:
            return error

    num_failed = 0
    with ThreadPoolExecutor(_NUM_CALLERS) as callers:
        paths = list(_paths(args.images))
        if not args.json:
            print(
                f"{reward}: {pair.positive_text!r} against {pair.negative_text!r}\n reward  positive  negative  image"
            )
        for path, outcome in zip(paths, callers.map(score, paths), strict=True):
            if isinstance(outcome, RewardResponse):
                print(_json_line(path, outcome) if args.json else _row(path, outcome), flush=True)
            else:
                print(f"srpo score: {path}: {outcome}", file=sys.stderr)
                num_failed += 1
    return 1 if num_failed else 0


def _paths(names: Iterable[str]) -> Iterator[Path]:
    """`-` stands for the names on stdin, one a line."""
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
