"""Describe the served rewards to callers, and choose one by name."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shown

from pydantic import BaseModel, ConfigDict, Field

from services.contract import ContractError


class UnknownReward(ContractError):
    """A request for a reward that is not served, or for none although several are; the text names the served ones."""

    reason = "unknown_reward"


class RewardInfo(BaseModel):
    """One served reward. With `placement: own`, what its weights tell is null until it has answered once."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(description="its name in requests", examples=["fluent-clip"])
    kind: str = Field(description="family of models", examples=["clip"])
    checksum: str | None = Field(default=None, description="of the weights", examples=["sha256:…"])
    is_image_only: bool = Field(default=False, description="reads neither prompt nor control words")
    max_text_tokens: int | None = Field(
        default=None, description="a longer text is an error; no text is cut", examples=[77]
    )
    logit_scale: float | None = Field(
        default=None, description="the model's own P(i preferred to j) is sigmoid(logit_scale · (reward_i − reward_j))"
    )


class RewardList(BaseModel):
    models: list[RewardInfo]


def choose_reward(rewards: Mapping[str, RewardInfo], name: str | None) -> RewardInfo:
    """Return the reward of that name, or for None the only one. Raise UnknownReward naming the served ones."""
    if name is None and len(rewards) == 1:
        return next(iter(rewards.values()))
    if name is None or name not in rewards:
        problem = "reward must be given" if name is None else f"reward {shown(name)} is not served here"
        raise UnknownReward(f"{problem}; served: {', '.join(rewards)}")
    return rewards[name]
