"""The section `objective` of a run file: what a branch maximizes, at which noise levels, and how often.

Every default is that of Shen et al., arXiv 2509.06942 (SRPO), for HPS v2.1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from services.config.fields import Frozen, Positive, PositiveFloat, Schedule
from services.config.rewards import BranchName

ObjectiveKind = Literal["plain", "sgp", "srp", "srp_guided"]


class ObjectiveConfig(Frozen):
    """What a branch maximizes, at which noise levels, and how often one rollout is used.

    The training levels divide a range of sigma evenly. The range lies between two points of a grid
    (`num_grid_steps`, `grid_index_range`) or is given by value (`sigma_range`).
    """

    kind: ObjectiveKind = "srp_guided"
    """`plain`: R(x, prompt), without control words. `sgp`: R(x, positive). `srp`: R(x, positive) − R(x, negative).
    `srp_guided`: (1 + k) · R(x, positive) − R(x, negative). The invert branch swaps the words; `plain`, which has none,
    changes its sign there. A reward that reads no text has the noised image in place of the negative word."""

    branches: tuple[BranchName, ...] = ("denoise", "invert")
    """`denoise`, `invert`, or both."""

    train_guidance_scale: float = 3.5
    """The guidance embedding of the one forward with gradient."""

    truncate_timestep: bool = False
    """Cut 1000 · sigma to a whole number before the model sees it, as the published code does; in training only, never
    in evaluations."""

    num_grid_steps: Positive = 50
    """The number of steps of the grid of sigmas, which has the rollout's shift."""

    grid_index_range: tuple[int, int] = (5, 25)
    """The two points of the grid between which the training levels lie."""

    sigma_range: tuple[float, float] | None = None
    """(low, high) within (0, 1): the range of sigma by value, in place of the grid."""

    num_levels: Positive = 1000
    """The number of levels into which the range of sigma is divided."""

    level_range: tuple[int, int] = (5, 995)
    """The training level is drawn uniformly from this range."""

    num_delta_levels: Positive = 100
    """Δσ, how far above or below its target a branch starts, in levels. It shrinks near both ends of the range."""

    delta_sigma: PositiveFloat | None = None
    """Δσ by value, rounded to whole levels, in place of `num_delta_levels`."""

    discount: Schedule = Schedule(kind="constant", start=1.0)
    """λ, the factor on a branch's loss at its level."""

    recovery_weight: Literal["natural", "normalized"] = "natural"
    """What happens to w = Δσ / (1 − sigma_end), the factor by which the reward's gradient reaches the velocity.
    `natural`: it stays. `normalized`: it is divided out, so that all noise levels count the same but for λ."""

    num_injections: Positive = 1
    """How many pairs of sigma and noise are injected into each rollout. Their levels come from as many equal parts of
    `level_range`."""

    injection_noise: Literal["rollout", "fresh"] = "rollout"
    """`rollout`: the noise that the rollout started from. `fresh`: a new noise for each injection."""

    update_per_injection: bool = False
    """Make an optimizer step after each injection, in place of one after all."""

    @field_validator("kind", mode="before")
    @classmethod
    def _name_the_new_word(cls, kind: object) -> object:
        if kind == "direct_align":  # the name of a method, and once of this objective too
            raise ValueError("objective.kind 'direct_align' is now 'plain'")
        return kind

    @model_validator(mode="after")
    def _branches_differ(self) -> ObjectiveConfig:
        if not self.branches or len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches must be one or both of denoise and invert, not {list(self.branches)}")
        return self

    @model_validator(mode="after")
    def _levels_lie_in_the_range(self) -> ObjectiveConfig:
        first, last = self.grid_index_range
        if not 0 <= first < last <= self.num_grid_steps:
            raise ValueError(
                f"grid_index_range must rise within [0, {self.num_grid_steps}] (num_grid_steps), "
                f"not {self.grid_index_range}"
            )
        if self.sigma_range is not None and not 0 < self.sigma_range[0] < self.sigma_range[1] < 1:
            raise ValueError(f"sigma_range must rise within (0, 1), not {self.sigma_range}")
        low, high = self.level_range
        if not 1 <= low <= high < self.num_levels:
            raise ValueError(
                f"level_range must rise within [1, {self.num_levels - 1}] (num_levels − 1), not {self.level_range}"
            )
        if self.num_injections > high - low + 1:
            raise ValueError(f"num_injections {self.num_injections} is more than the levels of {self.level_range}")
        return self

    @model_validator(mode="after")
    def _one_way_each(self) -> ObjectiveConfig:
        fields = type(self).model_fields
        for by_value, by_count in (("sigma_range", "grid_index_range"), ("delta_sigma", "num_delta_levels")):
            if getattr(self, by_value) is not None and getattr(self, by_count) != fields[by_count].default:
                raise ValueError(f"give {by_value} or {by_count}, not both")
        if self.delta_sigma is None and self.num_delta_levels >= self.num_levels:
            raise ValueError(
                f"num_delta_levels {self.num_delta_levels} is larger than the range: {self.num_levels} (num_levels)"
            )
        return self
