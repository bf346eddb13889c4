"""Load one reward, and turn prompt pairs into a function from images to similarities.

The three kinds of model (models/protocol.py) differ here and nowhere above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from reward_server.metrics import Record
from reward_server.models import AnyArgs, ImageOnly, Joint, Shrinks, TwoTower, load_reward
from reward_server.scoring.srp import Similarities, similarity
from reward_server.scoring.text_cache import TextCache
from services.contract import PromptPair

Prepared = tuple[Tensor, Tensor] | PromptPair  # a pair's embeddings (embedding,), or its texts


class LoadedReward:
    """A reward with its model loaded. Raises WeightsError if the weights are not as the arguments say.

    version: name, checksum, and what else makes its rewards incomparable with others; num_views: of each image;
    gradient_scale: of srp.py; shrink: the model's (models/protocol.py), or None.
    """

    def __init__(self, name: str, args: AnyArgs, num_cached_texts: int, record: Record) -> None:
        self.name = name
        self.device = torch.device(args.device)
        self.model = load_reward(args)
        self.num_views = args.num_views
        self.gradient_scale = args.gradient_scale
        self.shrink = self.model.shrink if isinstance(self.model, Shrinks) else None
        self.version = f"{name}@{self.model.checksum}{args.version_suffix}"
        if isinstance(self.model, TwoTower):
            self._texts = TextCache(name, self.model.embed_text, num_cached_texts, record)

    def prepare(self, pairs: Sequence[PromptPair]) -> Sequence[Prepared]:
        """Prepare each pair for `similarities`. Raise ContractError naming a text that is too long for this reward."""
        if not isinstance(self.model, TwoTower):
            return pairs
        embeds = self._texts.embed([text for pair in pairs for text in (pair.positive_text, pair.negative_text)])
        return list(zip(embeds[::2], embeds[1::2], strict=True))

    def similarities(self, prepared: Sequence[Prepared]) -> Similarities:
        """Return a function of as many images, each with its own pair. It may raise ContractError as `prepare` does."""
        model = self.model
        match model:
            case TwoTower():
                positive, negative = (torch.stack(side) for side in zip(*prepared, strict=True))

                def two_tower(images: Tensor) -> tuple[Tensor, Tensor]:
                    embeds = model.embed_image(images)
                    return similarity(embeds, positive), similarity(embeds, negative)

                return two_tower
            case ImageOnly():

                def image_only(images: Tensor) -> tuple[Tensor, Tensor]:
                    score = model.score_image(images)
                    return score, torch.zeros_like(score)

                return image_only
            case Joint():
                texts = [pair for pair in prepared if isinstance(pair, PromptPair)]

                def joint(images: Tensor) -> tuple[Tensor, Tensor]:
                    positive = model.score_pairs(images, [pair.positive_text for pair in texts])
                    return positive, model.score_pairs(images, [pair.negative_text for pair in texts])

                return joint
            case _:
                assert_never(model)
