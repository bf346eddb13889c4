"""Find how many images a reward's device takes at once, by trying: twice as many until memory or time ends it.

    largest_batch(reward, image_px=720, max_images=512, max_seconds=2.0)     # 128

Tried is what costs most, a forward with a gradient, with all other rewards of the process loaded. The result is a power
of two, so that on average a quarter of the memory stays free for larger images. Larger ones that do not fit all the
same are scored in halves (scorer.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from reward_server.models.transfer import to_device
from reward_server.scoring.forward import start
from reward_server.scoring.loaded_reward import LoadedReward
from reward_server.scoring.out_of_memory import OutOfMemory, short_of_memory
from services.contract import PromptPair

_PAIR = PromptPair("a photo", "sharp", "blurred")
_log = logging.getLogger(__name__)


def largest_batch(reward: LoadedReward, image_px: int, max_images: int, max_seconds: float | None) -> int:
    """Return how many square images, of `image_px` a side, to score at once. Raise OutOfMemory if one is too many."""

    def seconds_for(num_images: int) -> float:
        with short_of_memory(f"{num_images} images of {image_px} x {image_px} pixels for reward {reward.name!r}"):
            _try(reward, image_px, num_images)  # chooses kernels and takes memory, which takes time once
            return _try(reward, image_px, num_images)

    num_images, seconds, reason = _climb(seconds_for, max_images, max_seconds)
    _log.info("reward %r: %d images of %d px take %.3f s; %s", reward.name, num_images, image_px, seconds, reason)
    return num_images


def _climb(seconds_for: Callable[[int], float], max_images: int, max_seconds: float | None) -> tuple[int, float, str]:
    """Return the largest power of two that fits, its seconds, and what kept it from being larger."""
    num_images, seconds = 1, seconds_for(1)
    while 2 * num_images <= max_images:
        if max_seconds is not None and seconds > max_seconds / 2:  # as good as linear: do not try what takes too long
            return num_images, seconds, f"more would take longer than max_batch_s {max_seconds:g}"
        try:
            seconds_of_more = seconds_for(2 * num_images)
        except OutOfMemory:
            return num_images, seconds, "twice as many do not fit into the memory"
        if max_seconds is not None and seconds_of_more > max_seconds:
            return num_images, seconds, f"more would take longer than max_batch_s {max_seconds:g}"
        num_images, seconds = 2 * num_images, seconds_of_more
    return num_images, seconds, f"no more than max_queued_images {max_images} can wait"


def _try(reward: LoadedReward, image_px: int, num_images: int) -> float:
    """Return the seconds of one forward and backward."""
    images = to_device(torch.rand(num_images, 3, image_px, image_px), reward.device)
    _, seconds = start(reward, images, reward.prepare([_PAIR] * num_images), [0.0] * num_images, with_gradient=True)()
    return sum(seconds)
