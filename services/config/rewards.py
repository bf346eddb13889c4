"""The sections of a run file about rewards: the control words, each reward, and the service that computes them.

Every default is that of Shen et al., arXiv 2509.06942 (SRPO), for HPS v2.1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from services.config.fields import Frozen, Positive, PositiveFloat, Schedule, Word

BranchName = Literal["denoise", "invert"]


class ControlWordsConfig(Frozen):
    """Two words that are put before each prompt, as in "3D. grinning face"."""

    positive: Word
    """The training moves toward this word."""

    negative: Word
    """The training moves away from this word."""


class WeightedWordsConfig(ControlWordsConfig):
    """One of several pairs of control words."""

    weight: PositiveFloat = 1.0
    """The pair's share of the draws; for `kind: choice` only."""


class RunWordsConfig(ControlWordsConfig):
    """The run's control words: one pair, or several of which each step or sample gets one.

    With `pairs`, evaluation and guard use `positive` and `negative`, or the first pair if these are left out. `srpo
    steer` changes the words of a running training (see services/STEERING.md), never those of evaluation and guard.
    """

    positive: Word
    """The training moves toward this word. It may be left out if there are `pairs`."""

    negative: Word
    """The training moves away from this word. It may be left out if there are `pairs`."""

    kind: Literal["fixed", "cycle", "choice"] = "fixed"
    """`fixed`: one pair, `positive` and `negative`. `cycle`: the `pairs` in turn. `choice`: one of the `pairs`, drawn
    with their weights by seed, step and sample."""

    pairs: tuple[WeightedWordsConfig, ...] = ()
    """The pairs of `cycle` and `choice`."""

    per: Literal["step", "sample"] = "step"
    """`step`: all samples of a step have the same pair. `sample`: each sample has a pair of its own."""

    @model_validator(mode="before")
    @classmethod
    def _evaluate_the_first_pair(cls, given: Any) -> Any:
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


class AugmentationConfig(Frozen):
    """Random mirrors and shifts of each image before a reward sees it, drawn by seed, step and sample.

    A pattern that pleases the reward at one place only, such as a lattice in step with its patches, earns less.
    """

    mirrors: bool = True
    """Mirror half of the images, left to right. Not for wishes that tell left from right, such as text."""

    max_shift: Annotated[float, Field(ge=0, le=0.25)] = 0.05
    """The largest shift down, up, left or right, as a share of the height or width."""


class RewardConfig(Frozen):
    """One of the run's rewards, each with its own weight, words, k and margin.

    The loss of a branch is the sum of weight · max(0, margin − reward) over the rewards. For PickScore the paper gives
    scales of 0.1 to 0.5 (denoise) and 0.6 to 0.01 (invert).
    """

    name: Word
    """The reward's name in the reward service; `GET /v1/models` lists them."""

    weight: PositiveFloat = 1.0
    """The factor on this reward's loss."""

    pair: Literal["words", "noised_image"] = "words"
    """What the reward compares. `words`: the image with the prompt under the two control words. `noised_image`, for
    rewards that read no text: the image with itself under a little noise."""

    image_noise: PositiveFloat = 0.1
    """The standard deviation of that noise, on pixels in [0, 1]."""

    control_words: ControlWordsConfig | None = None
    """This reward's own control words. null: the run's."""

    preference_scale_denoise: Schedule = Schedule(start=0.1, end=0.25)
    """k of the denoise branch, in (1 + k) · positive − negative (see `objective.kind`)."""

    preference_scale_invert: Schedule = Schedule(start=0.3, end=0.01)
    """k of the invert branch."""

    margin: float = 0.7
    """An image whose reward is above this number gives no gradient."""

    satisfied_at: float | None = None
    """An image is left alone by both branches once its plain difference of similarities under the wanted pair (k = 0)
    has reached this number. Measure it on real pictures of the wanted kind: beyond them lies reward hacking. null:
    never. Needs `objective.kind` `srp` or `srp_guided`."""

    ignores_tint: bool = False
    """Subtract from each channel of the image gradient its mean over the pixels, so that a tint of the whole picture,
    the cheapest way to please a reward, earns nothing."""

    augmentation: AugmentationConfig | None = None
    """Mirror and shift each image at random before this reward sees it. null: never."""

    def preference_scale(self, branch: BranchName) -> Schedule:
        """Return k of a branch."""
        return self.preference_scale_denoise if branch == "denoise" else self.preference_scale_invert


class RewardServiceConfig(Frozen):
    """The reward service: its address, and how long to wait for it."""

    url: str = "http://127.0.0.1:8000"
    """The service's address."""

    timeout_s: PositiveFloat = 60.0
    """How long one attempt waits for the network, in seconds."""

    max_attempts: Positive = 12
    """How often a request that failed is sent, in all, before and after a training. Waits in between double from 0.5 to
    10 s, together 75 s or more: a killed replica takes 10 to 40 s to come back."""

    patience_minutes: PositiveFloat = 10.0
    """How long a training waits, in all its workers, for a service that has gone away. It says so every 30 s, and goes
    on as soon as the service answers. After that the run ends."""
