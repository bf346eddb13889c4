"""Measure images by served rewards: their similarities to the prompts under the run's positive and negative word."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from services.config.run import RunConfig
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward
from trainer.evaluation.measurements import Similarities


class Scores(Protocol):
    """Answers reward requests: a RewardClient, or a scorer in the same process."""

    def score(self, request: RewardRequest, /) -> RewardResponse: ...


def similarities(
    client: Scores, config: RunConfig, reward: str, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the similarities (num_images,) of images to their prompts, under the positive and the negative word.

    images: (num_images, 3, height, width) uint8. The words are the reward's own if the run gives it some, else the
    run's. The difference of the two is the reward at preference_scale 0; a scale above 0 would also reward the subject.
    """
    words = {each.name: each.control_words for each in config.rewards}.get(reward) or config.control_words
    requested, batch, positive, negative = (WeightedReward(reward),), config.evaluation.batch, [], []
    for start in range(0, len(images), batch):
        pairs = tuple(PromptPair(each, words.positive, words.negative) for each in prompts[start : start + batch])
        chunk = (images[start : start + batch].float() / 255).numpy()
        response = client.score(RewardRequest(chunk, pairs, (0.0,) * len(pairs), requested, with_gradient=False))
        positive.append(torch.tensor(response.positive_similarities[0]))
        negative.append(torch.tensor(response.negative_similarities[0]))
    return torch.cat(positive), torch.cat(negative)


def reward_metrics(config: RunConfig, held_out_reward: str | None = None) -> dict[str, str]:
    """Return metric name -> reward, for the rewards that the run trains on and the held-out one.

    The only reward that a run trains on has the metric "reward"; several have their own names in it.
    """
    names = [reward.name for reward in config.rewards]
    trained = {f"reward_{name}": name for name in names} if len(names) > 1 else {"reward": names[0]}
    return trained | ({"held_out_reward": held_out_reward} if held_out_reward else {})


def measures_of(client: Scores, config: RunConfig, metrics: dict[str, str]) -> dict[str, Similarities]:
    """Return what a Measurer measures rewards with, by metric name. metrics: metric name -> reward."""
    return {name: partial(similarities, client, config, reward) for name, reward in metrics.items()}
