"""What a run maximises, as keys of its file: the objective, and the rewards with their pairs, scales and margins.

Source of the method and of every default: Shen et al., arXiv 2509.06942 (SRPO), for HPS v2.1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
BranchName = Literal["denoise", "invert"]
ObjectiveKind = Literal["direct_align", "sgp", "srp", "srp_guided"]


class Frozen(BaseModel):
    """A part of a run file: cannot change, knows all its keys, holds finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ControlWordsConfig(Frozen):
    """The words put before each prompt: towards the positive one, away from the negative one."""

    positive: Word
    negative: Word


class WeightedWordsConfig(ControlWordsConfig):
    """One of several pairs; the weight is its share of the draws."""

    weight: PositiveFloat = 1.0


class RunWordsConfig(ControlWordsConfig):
    """The run's words: one pair, or `pairs` of which each step or sample gets one.

    With `pairs`, the pair of evaluation and guard is positive and negative, or if these are left out the first one.
    `srpo steer` changes the words of a running training (services/steering.py), never those of evaluation and guard.
    """

    # cycle: the pairs in turn. choice: drawn by (seed, step, sample index) with their weights.
    kind: Literal["fixed", "cycle", "choice"] = "fixed"
    pairs: tuple[WeightedWordsConfig, ...] = ()
    per: Literal["step", "sample"] = "step"  # whether all samples of a step share a pair

    @model_validator(mode="before")
    @classmethod
    def _first_pair_is_judged(cls, given: Any) -> Any:
        match given:
            case {"pairs": [{"positive": positive, "negative": negative}, *_]}:
                return {"positive": positive, "negative": negative, **given}
        return given

    @model_validator(mode="after")
    def _pairs_fit_the_kind(self) -> RunWordsConfig:
        if (self.kind == "fixed") != (not self.pairs):
            needed = "has positive and negative, no pairs: choose cycle or choice" if self.pairs else "needs pairs"
            raise ValueError(f"kind {self.kind} {needed}")
        if self.kind != "choice" and (weights := [pair.weight for pair in self.pairs if pair.weight != 1]):
            raise ValueError(f"weight {weights[0]:g} has no effect with kind {self.kind}: choose choice")
        return self


class Schedule(Frozen):
    """A number along the training levels, of any sign: `start` at the least noisy level, `end` at the noisiest.

    cosine leaves `start` and reaches `end` slowly. constant has a start only.
    """

    kind: Literal["constant", "linear", "cosine"] = "linear"
    start: float
    end: float | None = None

    @model_validator(mode="after")
    def _has_an_end_unless_constant(self) -> Schedule:
        if (self.end is None) != (self.kind == "constant"):
            raise ValueError(f"a {self.kind} schedule {'needs an' if self.end is None else 'has no'} end")
        return self


class ObjectiveConfig(Frozen):
    """What a branch maximises, at which noise levels, and how often one rollout serves."""

    # direct_align: R(x, prompt), without control words. sgp: R(x, positive). srp: R(x, positive) − R(x, negative).
    # srp_guided: (1 + k)·R(x, positive) − R(x, negative). The invert branch swaps the words; direct_align, which has
    # none, changes its sign there. An image-only reward has the noised image in place of the negative word.
    kind: ObjectiveKind = "srp_guided"
    branches: tuple[BranchName, ...] = ("denoise", "invert")  # both, or one
    train_guidance_scale: float = 3.5  # of the one call with gradient
    # Cuts 1000·sigma to a whole number before the model sees it, as the published code does; never in evaluations.
    truncate_timestep: bool = False

    # Levels divide a range of sigma evenly: between two points of a grid of num_grid_steps with the rollout's shift …
    num_grid_steps: Positive = 50
    grid_index_range: tuple[int, int] = (5, 25)
    # … or by value, (low, high) within (0, 1), in place of the two keys above.
    sigma_range: tuple[float, float] | None = None
    num_levels: Positive = 1000
    level_range: tuple[int, int] = (5, 995)  # the training level m is drawn uniformly from it
    # Δσ, how far above and below its target a branch starts: in levels, or by value (rounded to whole levels, in place
    # of num_delta_levels). Shrunk near both ends of the range.
    num_delta_levels: Positive = 100
    delta_sigma: PositiveFloat | None = None

    discount: Schedule = Schedule(kind="constant", start=1.0)  # λ, the multiplier on a branch's loss at its level
    # w = Δσ / (1 − sigma_end), by which the reward's gradient reaches the velocity: as it falls out, or divided out,
    # so that all noise levels count the same but for λ.
    recovery_weight: Literal["natural", "normalised"] = "natural"

    # How many (sigma, noise) are injected into each rollout; the levels come from as many equal parts of level_range.
    num_injections: Positive = 1
    injection_noise: Literal["rollout", "fresh"] = "rollout"  # the noise the rollout came from, or a new one each
    update_per_injection: bool = False  # an optimiser step after each injection, in place of one after all

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


class RewardConfig(Frozen):
    """One reward of a run; the loss of a branch is Σ weight · relu(margin − reward). PickScore's published scales:
    denoise 0.1 to 0.5, invert 0.6 to 0.01."""

    name: Word  # one of those that the service lists at /v1/models
    weight: PositiveFloat = 1.0
    # noised_image is for rewards that read no text: the image is compared with itself under a little noise, of this
    # standard deviation on pixels in [0, 1].
    pair: Literal["words", "noised_image"] = "words"
    image_noise: PositiveFloat = 0.1
    control_words: ControlWordsConfig | None = None  # None: the run's
    preference_scale_denoise: Schedule = Schedule(start=0.1, end=0.25)  # k, see objective.kind
    preference_scale_invert: Schedule = Schedule(start=0.3, end=0.01)
    margin: float = 0.7
    # An image whose plain difference of similarities under the wanted pair (k = 0) has reached this is done: neither
    # branch pushes it further. Real pictures of the wanted kind say where; beyond them lies reward hacking.
    satisfied_at: float | None = None  # None: never
    # Takes its mean over the pixels off each channel of the image gradient, so that a tint of the whole picture, the
    # cheapest way to please a reward, earns nothing.
    ignores_tint: bool = False

    def preference_scale(self, branch: BranchName) -> Schedule:
        return self.preference_scale_denoise if branch == "denoise" else self.preference_scale_invert


class RewardServiceConfig(Frozen):
    """Where the rewards are served, and how long to wait."""

    url: str = "http://127.0.0.1:8000"
    timeout_s: PositiveFloat = 60.0
    max_attempts: Positive = 12
