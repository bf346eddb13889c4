"""`srpo rank-words`: pictures and candidate control words in, what each word would do to them out.

Asks the reward service for the similarity of every picture to "word. prompt" and its gradient; rank_words.py makes
verdicts of that. One picture's gradients are held at a time.
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
from services.pictures import read_picture

_MAX_TEXTS_PER_REQUEST = 8
_MAX_PIXELS_PER_REQUEST = 4096**2  # of all copies of a picture; by default the service takes four times as many
_DRAW_TIMEOUT_S = 3600.0
_LEGEND = """\
strength  gradient of the reward that the word adds; 1: as much as a meaningless word may by chance
moved     share of the pictures on which that is above 1
common    share of it that the other words' mean would do as well
reward    its mean; side = mean / standard deviation; agree = share of pictures with its sign
verdict   weak: strength up to 1; inconsistent: its interval reaches down to 1, or half of the pictures are not moved;
          repeats …: common above 50 %"""

Picture = NDArray[np.uint8]  # (3, height_px, width_px)


def try_words(args: argparse.Namespace, client: RewardClient, reward: str) -> int:
    """Print a table, or JSON lines. Raises TrialError, ContractError for a picture or word, RewardError."""
    words = [*args.words, *(_lines(args.words_file) if args.words_file else ())]
    words = list(dict.fromkeys([*words, args.negative] if args.negative else words))
    prompts = _prompts(args)
    check_enough(len(prompts), words, args.negative)  # before anything is drawn or asked
    pictures = draw(args.model, prompts) if args.model else [read_picture(path) for path in args.images]
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
    """Each picture under its own prompt with every word and meaningless word. Raises RewardError."""
    meaningless = meaningless_words()
    texts = [*words, *meaningless]
    similarities = np.empty((len(pictures), len(texts)))
    gram = np.empty((len(pictures), len(texts), len(texts)))
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        similarities[index], gradients = _ask(client, reward, picture, prompt, texts)
        gram[index] = gradients @ gradients.T
    return Measured(tuple(words), meaningless, similarities, gram)


def _ask(
    client: RewardClient, reward: str, picture: Picture, prompt: str, texts: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """(texts,) similarities, and (texts, pixels) gradients less that of the last text."""
    similarities, gradients = np.empty(len(texts)), np.zeros((len(texts), picture.size), np.float32)
    size = texts_per_request(*picture.shape[1:])
    for start in range(0, len(texts) - 1, size):
        chunk = slice(start, min(start + size, len(texts) - 1))
        pairs = tuple(PromptPair(prompt, text, texts[-1]) for text in texts[chunk])
        images = np.broadcast_to(picture, (len(pairs), *picture.shape))
        response = client.score(RewardRequest(images, pairs, (0.0,) * len(pairs), (WeightedReward(reward),)))
        assert isinstance(response.image_gradient, np.ndarray)  # the client has checked its shape
        similarities[chunk], similarities[-1] = response.positive_similarities[0], response.negative_similarities[0, 0]
        gradients[chunk] = response.image_gradient.reshape(len(pairs), -1)
    return similarities, gradients


def texts_per_request(height_px: int, width_px: int) -> int:
    """How many copies of such a picture, each with a text of its own, one request may hold; at least one."""
    return max(1, min(_MAX_TEXTS_PER_REQUEST, _MAX_PIXELS_PER_REQUEST // (height_px * width_px)))


def _prompts(args: argparse.Namespace) -> list[str]:
    """One for each picture that is given or to be drawn."""
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
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrialError(f"cannot read {file}: {error}") from error
    return [line for line in lines if line]


def draw(model: str, prompts: Sequence[str]) -> list[Picture]:
    """One picture a prompt, as `srpo sample` draws them. Raises TrialError with its last words if it fails."""
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
    """One line a word; what the columns mean is below it."""
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
