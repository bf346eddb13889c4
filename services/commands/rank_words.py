"""`srpo rank-words`: print which control words could change the reward on given pictures, before any training.

It gets the similarity of every picture to "word. prompt" and its gradient from the reward service; word_effects.py
judges the words by them. One picture's gradients are held at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.clients.reward import RewardClient
from services.commands.usage import add_reward_options, choose_reward
from services.commands.word_effects import (
    Finding,
    Measured,
    TrialError,
    check_enough,
    meaningless_words,
    rank,
    rank_pairs,
)
from services.contract import PromptPair, RewardRequest, WeightedReward
from services.lines import read_lines
from services.pictures import read_picture

_MAX_TEXTS_PER_REQUEST = 8
_MAX_PIXELS_PER_REQUEST = 4096**2  # of all copies of a picture; the service takes four times as many by default
_DRAW_TIMEOUT_S = 3600.0
_LEGEND = """\
strength  gradient that the word adds to the reward; 1: as much as a meaningless word may add by chance
moved     share of the pictures with a strength above 1
common    share of the word's effect that the other words' mean has too
reward    mean over the pictures; side = mean / standard deviation; agree = share of pictures with its sign
verdict   weak: strength up to 1; inconsistent: its interval reaches down to 1, or half of the pictures are not moved;
          repeats …: common above 50 %"""

Picture = NDArray[np.uint8]  # (3, height_px, width_px)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `srpo rank-words`."""
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP; six or more")
    parser.add_argument("--prompt", help="what all images show, without control words")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, for each image or to draw")
    parser.add_argument("--model", help="draw the images from --prompts with it: a folder, or a hub id")
    parser.add_argument("--num-images", type=int, default=24, help="how many of the prompts to draw (%(default)s)")
    parser.add_argument("--words", nargs="+", default=[], metavar="WORD", help="candidate control words")
    parser.add_argument("--words-file", type=Path, metavar="FILE", help="a file with more of them, one a line")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--negative", help="compare each word with this one, not with meaningless words")
    against.add_argument("--pairs", action="store_true", help="compare every two words with each other")
    add_reward_options(parser)
    parser.set_defaults(handler=_rank_words)


def _rank_words(args: argparse.Namespace) -> int:
    """Print a table, or JSON lines. Raise TrialError, RewardError, or ContractError for a bad picture or word."""
    reward = choose_reward(args)
    words = [*args.words, *(_lines(args.words_file) if args.words_file else ())]
    words = list(dict.fromkeys([*words, args.negative] if args.negative else words))
    prompts = _prompts(args)
    check_enough(len(prompts), words, args.negative)  # before anything is drawn or requested
    pictures = draw(args.model, prompts) if args.model else [read_picture(path) for path in args.images]
    with RewardClient(args.url) as client:
        measured = measure(client, reward, pictures, prompts, words)
    findings = rank_pairs(measured) if args.pairs else rank(measured, args.negative)
    if args.json:
        print(*(json.dumps(asdict(finding)) for finding in findings), sep="\n")
    else:
        print_table(findings, f"{reward} on {len(pictures)} pictures")
    return 0


def measure(
    client: RewardClient, reward: str, pictures: Sequence[Picture], prompts: Sequence[str], words: Sequence[str]
) -> Measured:
    """Score each picture under its own prompt with every word and meaningless word. Raise RewardError."""
    meaningless = meaningless_words()
    texts = [*words, *meaningless]
    similarities = np.empty((len(pictures), len(texts)))
    gram = np.empty((len(pictures), len(texts), len(texts)))
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        similarities[index], gradients = _score_texts(client, reward, picture, prompt, texts)
        gram[index] = gradients @ gradients.T
    return Measured(tuple(words), meaningless, similarities, gram)


def _score_texts(
    client: RewardClient, reward: str, picture: Picture, prompt: str, texts: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return similarities (texts,), and gradients (texts, pixels) minus that of the last text."""
    similarities, gradients = np.empty(len(texts)), np.zeros((len(texts), picture.size), np.float32)
    size = texts_per_request(*picture.shape[1:])
    for start in range(0, len(texts) - 1, size):
        chunk = slice(start, min(start + size, len(texts) - 1))
        pairs = tuple(PromptPair(prompt, text, texts[-1]) for text in texts[chunk])
        images = np.broadcast_to(picture, (len(pairs), *picture.shape))
        response = client.score(RewardRequest(images, pairs, (0.0,) * len(pairs), (WeightedReward(reward),)))
        assert isinstance(response.image_gradient, np.ndarray)  # the client checks its shape
        similarities[chunk], similarities[-1] = response.positive_similarities[0], response.negative_similarities[0, 0]
        gradients[chunk] = response.image_gradient.reshape(len(pairs), -1)
    return similarities, gradients


def texts_per_request(height_px: int, width_px: int) -> int:
    """Return how many copies of such a picture, each with its own text, one request may hold; at least one."""
    return max(1, min(_MAX_TEXTS_PER_REQUEST, _MAX_PIXELS_PER_REQUEST // (height_px * width_px)))


def _prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompt of each picture that is given or will be drawn. Raise TrialError if they do not fit."""
    if args.model and (args.images or not args.prompts):
        raise TrialError("--model draws the lines of --prompts FILE: give no images beside it")
    if bool(args.prompt) == bool(args.prompts):
        raise TrialError("give --prompt TEXT for all images, or --prompts FILE with a line for each")
    prompts = _lines(args.prompts) if args.prompts else [args.prompt] * len(args.images)
    if args.model:
        return prompts[: args.num_images]
    if len(prompts) != len(args.images):
        raise TrialError(
            f"{len(args.images)} images and {len(prompts)} lines in {args.prompts}: there must be one each"
        )
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_lines(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise TrialError(f"cannot read {file}: {error}") from error
    return [line for line in lines if line]


def draw(model: str, prompts: Sequence[str]) -> list[Picture]:
    """Draw one picture a prompt with `srpo sample`. Raise TrialError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        strip = Path(folder) / "strip.png"
        options = [option for prompt in prompts for option in ("--prompt", prompt)]
        command = [sys.executable, "-m", "trainer.jobs.sample", model, *options, "-o", str(strip)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAW_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"{model} drew nothing in {_DRAW_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            raise TrialError(f"{model} cannot draw: {done.stderr.strip().splitlines()[-1:]}")
        return np.split(read_picture(strip), len(prompts), axis=2)


def print_table(findings: Sequence[Finding], title: str) -> None:
    """Print one line a word, and below the table what its columns mean."""
    width = max(len(_name(finding)) for finding in findings)
    print(title)
    print(f"{'word':{width}}  strength           moved  common   reward  side                agree  verdict")
    for finding in findings:
        common = "     -" if finding.common_share is None else f"{finding.common_share:6.0%}"
        print(
            f"{_name(finding):{width}}  {finding.strength:5.2f} {_interval(finding.strength_interval)}"
            f"  {finding.share_moved:5.0%}  {common}  {finding.reward:+.4f}"
            f"  {finding.side:+.2f} {_interval(finding.side_interval, '+')}  {finding.share_agreeing:5.0%}"
            f"  {finding.verdict}"
        )
    print(_LEGEND)


def _name(finding: Finding) -> str:
    return f"{finding.positive} | {finding.negative}" if finding.negative else finding.positive


def _interval(bounds: tuple[float, float], sign: str = "") -> str:
    return f"[{bounds[0]:{sign}.2f}, {bounds[1]:{sign}.2f}]"
