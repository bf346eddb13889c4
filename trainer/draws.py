"""Draw prompts, levels, words and noise for each sample: pure functions of (seed, step, sample_index).

`sample_index` is the position in the global batch. So one worker or many, a fresh run or a resumed one, see the same
samples. Each kind of draw has a stream of its own, so that no two are correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from services.config.rewards import ControlWordsConfig, RunWordsConfig

T = TypeVar("T")


class _Stream(IntEnum):
    ORDER = 0
    LEVEL = 1
    NOISE = 2
    EVALUATION = 3
    INJECTION = 4
    IMAGE = 5
    GUARD = 6
    SIZE = 7
    WORDS = 8
    MEMBER = 9
    ROWS = 10
    PLACE = 11


def shard(num_samples: int, rank: int, num_workers: int) -> range:
    """Return the sample indices of worker `rank`: every num_workers-th one, each index on exactly one worker."""
    return range(rank, num_samples, num_workers)


def batch_indices(seed: int, step: int, global_batch: int, num_prompts: int) -> list[int]:
    """Return a step's prompts: global_batch indices from shuffled epochs, each of which has every prompt once.

    >>> sorted(batch_indices(seed=0, step=0, global_batch=2, num_prompts=4)
    ...        + batch_indices(seed=0, step=1, global_batch=2, num_prompts=4))
    [0, 1, 2, 3]
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    epochs = {position // num_prompts for position in positions}
    orders = {epoch: _random(seed, _Stream.ORDER, epoch).permutation(num_prompts) for epoch in epochs}
    return [int(orders[position // num_prompts][position % num_prompts]) for position in positions]


def draw_bucket(seed: int, step: int, weights: Sequence[int]) -> int:
    """Draw one of several buckets for a step, in proportion to their weights. Return its index."""
    shares = np.cumsum(weights) / sum(weights)
    return int(np.searchsorted(shares, _random(seed, _Stream.SIZE, step).random(), side="right"))


def draw_levels(
    seed: int, step: int, sample_index: int, level_range: tuple[int, int], num_levels: int
) -> tuple[int, ...]:
    """Draw the training levels of a sample's injections, rising: one from each of num_levels equal parts of the range.

    A level is uniform in its part, both ends of the range included; num_levels is at most the number of levels in it.
    """
    low, high = level_range
    random, count = _random(seed, _Stream.LEVEL, step, sample_index), high - low + 1
    starts = [low + count * part // num_levels for part in range(num_levels + 1)]
    return tuple(int(random.integers(start, end)) for start, end in pairwise(starts))


def draw_words(words: RunWordsConfig, seed: int, step: int, sample_index: int) -> ControlWordsConfig:
    """Return the control words of a sample: the run's pair, or one of several as words.kind and words.per say."""
    if words.kind == "fixed":
        return words
    place = (step,) if words.per == "step" else (step, sample_index)
    if words.kind == "cycle":
        return words.pairs[sum(place) % len(words.pairs)]
    weights = np.array([pair.weight for pair in words.pairs])
    return words.pairs[_random(seed, _Stream.WORDS, *place).choice(len(weights), p=weights / weights.sum())]


def noise_generator(seed: int, step: int, sample_index: int) -> torch.Generator:
    """Return the CPU generator of a training sample's start noise."""
    return _generator(seed, _Stream.NOISE, step, sample_index)


def injection_generator(seed: int, step: int, sample_index: int, injection: int) -> torch.Generator:
    """Return the CPU generator of the fresh noise of a sample's injection."""
    return _generator(seed, _Stream.INJECTION, step, sample_index, injection)


def image_generator(seed: int, step: int, sample_index: int, injection: int) -> torch.Generator:
    """Return the CPU generator of the noise that a reward without text compares an image with."""
    return _generator(seed, _Stream.IMAGE, step, sample_index, injection)


def place_generator(seed: int, step: int, sample_index: int, injection: int) -> torch.Generator:
    """Return the CPU generator of an image's mirror and shift before it is scored."""
    return _generator(seed, _Stream.PLACE, step, sample_index, injection)


def member_generator(seed: int, step: int, sample_index: int, member: int) -> torch.Generator:
    """Return the CPU generator of all noise of one of the images that a sample's prompt gets (GRPO's groups)."""
    return _generator(seed, _Stream.MEMBER, step, sample_index, member)


def evaluation_generator(seed: int, image_index: int) -> torch.Generator:
    """Return the CPU generator of an evaluation image's start noise: the same in every evaluation, none of training."""
    return _generator(seed, _Stream.EVALUATION, image_index)


def guard_generator(seed: int, image_index: int) -> torch.Generator:
    """Return the same for the images of the guard."""
    return _generator(seed, _Stream.GUARD, image_index)


def draw_guard_prompts(seed: int, prompts: Sequence[T], num_prompts: int) -> tuple[T, ...]:
    """Return `num_prompts` of the prompts, none twice, the same at every check. Raise ValueError if there are fewer."""
    if num_prompts > len(prompts):
        raise ValueError(f"guard.num_prompts {num_prompts} is more than the {len(prompts)} prompts there are")
    order = _random(seed, _Stream.GUARD).permutation(len(prompts))
    return tuple(prompts[index] for index in order[:num_prompts])


def draw_rows(seed: int, num_images: int, num_shown: int) -> list[int]:
    """Draw which images a picture shows, none twice: rising rows below num_images."""
    return sorted(map(int, _random(seed, _Stream.ROWS).permutation(num_images)[:num_shown]))


def _sequence(seed: int, stream: _Stream, *place: int) -> np.random.SeedSequence:
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    return np.random.SeedSequence([seed, stream, *place])


def _random(seed: int, stream: _Stream, *place: int) -> np.random.Generator:
    return np.random.default_rng(_sequence(seed, stream, *place))


def _generator(seed: int, stream: _Stream, *place: int) -> torch.Generator:
    state = _sequence(seed, stream, *place).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))  # torch takes 63 bits without a sign
