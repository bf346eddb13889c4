"""Compute confidence intervals by the paired bootstrap, which draws the prompts again with replacement.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (resampling units), 10 (bias), 13
(percentiles). The prompt is the resampling unit, because images of one prompt resemble each other. Two policies are
compared on the same draws of prompts, so the difficulty of a prompt cancels out of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def draws_of_prompts(num_prompts: int, num_images_per_prompt: int, num_draws: int, seed: int) -> Iterator[Tensor]:
    """Yield `num_draws` draws of prompts with replacement, each as the rows of all images of the prompts drawn.

    Rows: (num_prompts · num_images_per_prompt,).
    """
    random = np.random.default_rng(seed)
    within = torch.arange(num_images_per_prompt)
    for _ in range(num_draws):
        prompts = torch.from_numpy(random.integers(num_prompts, size=num_prompts))
        yield (prompts[:, None] * num_images_per_prompt + within).flatten()


def interval(value: float, drawn: Tensor, confidence: float) -> Interval:
    """Return the interval of a number: `value` on all prompts, `drawn` on each draw of prompts (num_draws,).

    The interval is the spread of the draws about their own mean, shifted to the value. This removes the bias of numbers
    of a whole set, such as a Fréchet distance, which arises because images repeat within a draw.
    """
    spread = drawn.double() - drawn.double().mean()
    low, high = torch.quantile(spread, spread.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])).tolist()
    return Interval(value, value + low, value + high)
