"""Load reward models: one file a family, three protocols (protocol.py), one union of their arguments."""

from __future__ import annotations

from typing import Annotated, assert_never

from pydantic import Field

from reward_server.models.aesthetic import AestheticArgs, AestheticReward
from reward_server.models.clip import ClipArgs, ClipReward, PickScoreArgs
from reward_server.models.hpsv2 import Hpsv2Args, Hpsv2Reward
from reward_server.models.hpsv3 import Hpsv3Args, Hpsv3Reward
from reward_server.models.image_reward import ImageRewardArgs, ImageRewardReward
from reward_server.models.protocol import ImageOnly, Joint, RewardModel, Shrinks, TwoTower
from reward_server.models.weights import ChecksumError, WeightsArgs, WeightsError

AnyArgs = ClipArgs | PickScoreArgs | Hpsv2Args | AestheticArgs | ImageRewardArgs | Hpsv3Args
RewardArgs = Annotated[AnyArgs, Field(discriminator="kind")]

__all__ = [
    "AestheticArgs",
    "AnyArgs",
    "ChecksumError",
    "ClipArgs",
    "Hpsv2Args",
    "Hpsv3Args",
    "ImageOnly",
    "ImageRewardArgs",
    "Joint",
    "PickScoreArgs",
    "RewardArgs",
    "RewardModel",
    "Shrinks",
    "TwoTower",
    "WeightsArgs",
    "WeightsError",
    "load_reward",
]


def load_reward(args: AnyArgs) -> RewardModel:
    """Load the weights. Raise WeightsError naming the path if they are missing, wrong, or not those pinned."""
    match args:
        case ClipArgs() | PickScoreArgs():
            return ClipReward(args)
        case Hpsv2Args():
            return Hpsv2Reward(args)
        case AestheticArgs():
            return AestheticReward(args)
        case ImageRewardArgs():
            return ImageRewardReward(args)
        case Hpsv3Args():
            return Hpsv3Reward(args)
        case _:
            assert_never(args)
