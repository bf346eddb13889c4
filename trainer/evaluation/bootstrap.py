"""Compute confidence intervals by the paired bootstrap, which draws the prompts again with replacement.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (resampling units), 10 (bias), 13
(percentiles). The prompt is the resampling unit, because images of one prompt resemble each other. Two policies are
compared on the same draws of prompts, so the difficulty of a prompt cancels out of their difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with the ends of its confidence interval.

    >>> Interval(value=0.70, low=0.63, high=0.77)
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def draws_of_prompts(num_prompts: int, num_draws: int, seed: int) -> Tensor:
    """Draw as many prompts as there are, with replacement, `num_draws` times.

    Return how often each draw has each prompt, (num_draws, num_prompts).
    """
    random = np.random.default_rng(seed)
    drawn = (random.integers(num_prompts, size=num_prompts) for _ in range(num_draws))
    return torch.from_numpy(np.stack([np.bincount(prompts, minlength=num_prompts) for prompts in drawn]))


def interval(value: float, drawn: Tensor, confidence: float) -> Interval:
    """Return the interval of a number: `value` on all prompts, `drawn` on each draw of prompts (num_draws,).

    The interval is the spread of the draws about their own mean, shifted to the value. This removes the bias of numbers
    of a whole set, such as a Fréchet distance, which arises because images repeat within a draw.
    """
    spread = drawn.double() - drawn.double().mean()
    low, high = torch.quantile(spread, spread.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])).tolist()
    return Interval(value, value + low, value + high)
