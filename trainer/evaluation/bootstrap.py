"""Confidence intervals by drawing the prompts again: the paired bootstrap, pure statistics.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (resampling units), 10 (bias), 13
(percentiles). The prompt is the unit, because pictures of one prompt are alike. Two policies are compared on the same
draws of prompts, so that what is hard about a prompt cancels out of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Interval:
    """
    >>> Interval(value=0.70, low=0.63, high=0.77)
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def draws_of_prompts(num_prompts: int, num_images_per_prompt: int, num_draws: int, seed: int) -> Iterator[Tensor]:
    """`num_draws` times the rows (num_prompts · num_images_per_prompt,) of prompts drawn with replacement."""
    random = np.random.default_rng(seed)
    within = torch.arange(num_images_per_prompt)
    for _ in range(num_draws):
        prompts = torch.from_numpy(random.integers(num_prompts, size=num_prompts))
        yield (prompts[:, None] * num_images_per_prompt + within).flatten()


def interval(value: float, drawn: Tensor, confidence: float) -> Interval:
    """Of a number's `value` on all prompts and on each draw of prompts (num_draws,).

    The draws' spread about their own mean, laid around the value: numbers of a set, such as a Fréchet distance, are
    biased on a draw because pictures repeat in it, and this takes the bias out.
    """
    spread = drawn.double() - drawn.double().mean()
    low, high = torch.quantile(spread, spread.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])).tolist()
    return Interval(value, value + low, value + high)
