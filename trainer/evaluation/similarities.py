"""Ask a served reward how well images fit their prompts under the run's two control words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from services.config.run import RunConfig
from services.contract import PromptPair, RewardRequest, RewardResponse, WeightedReward


class Scores(Protocol):
    """What answers reward requests: RewardClient, or a scorer in the same process."""

    def score(self, request: RewardRequest, /) -> RewardResponse: ...


def similarities(
    client: Scores, config: RunConfig, reward: str, images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Of images (num_images, 3, height, width) uint8 to their prompts: (num_images,) under positive and negative word.

    The words are the reward's own where the run trains on it and gives it some, else the run's. Their difference is the
    reward at preference_scale 0; a scale above 0 would reward the subject as well.
    """
    words = {each.name: each.control_words for each in config.rewards}.get(reward) or config.control_words
    asked, batch, positive, negative = (WeightedReward(reward),), config.evaluation.batch, [], []
    for start in range(0, len(images), batch):
        pairs = tuple(PromptPair(each, words.positive, words.negative) for each in prompts[start : start + batch])
        chunk = (images[start : start + batch].float() / 255).numpy()
        response = client.score(RewardRequest(chunk, pairs, (0.0,) * len(pairs), asked, with_gradient=False))
        positive.append(torch.tensor(response.positive_similarities[0]))
        negative.append(torch.tensor(response.negative_similarities[0]))
    return torch.cat(positive), torch.cat(negative)
