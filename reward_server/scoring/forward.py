"""Ask a reward's device for one forward, and one backward if wanted, without waiting for it.

wait = start(reward, images, prepared, preference_scales, with_gradient=True)
columns, seconds = wait()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reward_server.models.transfer import to_cpu, to_device
from reward_server.scoring.loaded_reward import LoadedReward, Prepared
from reward_server.scoring.srp import value, value_for_gradient
from reward_server.scoring.stopwatch import Stopwatch

# rewards, positive and negative similarities (batch,), and the image gradient if wanted, on the CPU; seconds of forward
# and backward
Result = tuple[list[Tensor], list[float]]


def start(
    reward: LoadedReward,
    images: Tensor,
    prepared: Sequence[Prepared],
    preference_scales: Sequence[float],
    with_gradient: bool,
) -> Callable[[], Result]:
    """Return a function that waits for the results. Raise what the model raises, ContractError among it."""
    similarities = reward.similarities(prepared)
    scales = to_device(torch.tensor(preference_scales), reward.device)
    stopwatch = Stopwatch(reward.device)
    if with_gradient:
        outcome, image_gradient = value_for_gradient(similarities, images, scales, reward.gradient_scale)
    else:
        outcome = value(similarities, images, scales)
    stopwatch.mark()
    columns = [outcome.rewards, outcome.positive_similarities, outcome.negative_similarities]
    if with_gradient:
        columns.append(image_gradient())
        stopwatch.mark()
    arrived = to_cpu(columns)
    return lambda: (arrived(), stopwatch.seconds())
