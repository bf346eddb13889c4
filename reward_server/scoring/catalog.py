"""Which rewards are served, as callers see them."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shown

from pydantic import BaseModel, ConfigDict, Field

from services.contract import ContractError


class UnknownReward(ContractError):
    """A reward that is not served, or none where several are; the text names those served."""

    reason = "unknown_reward"


class RewardInfo(BaseModel):
    """One served reward. What only its weights tell is null until it is loaded, for one that is loaded on demand."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(description="what requests call it", examples=["fluent-clip"])
    kind: str = Field(description="family of models", examples=["clip"])
    checksum: str | None = Field(default=None, description="of the weights", examples=["sha256:…"])
    is_image_only: bool = Field(default=False, description="ignores the prompt and the control words")
    max_text_tokens: int | None = Field(
        default=None, description="a longer text is an error; none is cut", examples=[77]
    )
    logit_scale: float | None = Field(
        default=None, description="the model's own P(i preferred to j) is sigmoid(logit_scale · (reward_i − reward_j))"
    )


class RewardList(BaseModel):
    models: list[RewardInfo]


def choose_reward(rewards: Mapping[str, RewardInfo], name: str | None) -> RewardInfo:
    """The reward of that name, or the only one. Raises UnknownReward naming those served: none is chosen silently."""
    if name is None and len(rewards) == 1:
        return next(iter(rewards.values()))
    if name is None or name not in rewards:
        problem = "reward must be given" if name is None else f"reward {shown(name)} is not served here"
        raise UnknownReward(f"{problem}; served: {', '.join(rewards)}")
    return rewards[name]
