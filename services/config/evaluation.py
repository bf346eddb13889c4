"""The sections `evaluation`, `guard` and `comparison` of a run file: what is measured of the pictures, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.dataset import CaptionedConfig
from services.config.fields import Frozen, NonNegative, Positive, PositiveFloat
from services.config.prompts import PromptsPath


class EvaluationConfig(Frozen):
    """Pictures of fixed prompts and seeds. Judges are for evaluation only and never give a gradient."""

    prompts_path: PromptsPath
    """Prompts that are held out from training; files or benchmark as in `prompts.path`."""

    num_images_per_prompt: Positive = 1
    """The number of images of a prompt, each with noise of its own."""

    num_grid_images: Positive = 24
    """The number of images in the sample grids of a running training."""

    num_steps: Positive = 25
    """The number of sampling steps."""

    guidance_scale: float = 3.5
    """The guidance embedding of sampling; the default is FLUX.1-dev's own."""

    every_num_steps: Positive = 20
    """The training steps between two sample grids."""

    batch: Positive = 32
    """The number of images that each worker draws, judges and scores at once."""

    judge_path: Path | None = None
    """A folder with style/, subject/ and reference.safetensors: a classifier, an embedder and numbers of real
    pictures."""

    reference_path: Path | None = None
    """A folder of real pictures. The distance to them is the metric `frechet_reference` of guard and `srpo
    evaluate`."""

    truth: CaptionedConfig | None = None
    """Real pictures of the wanted style, one for each prompt, which is its caption. Evaluation, guard and `srpo
    evaluate` compare each image with the picture of its prompt; these metrics begin with `truth_`."""

    draws_oracle: bool = False
    """Also draw with the base model under the run's positive control word, as in "3D. grinning face", in evaluation
    and `srpo evaluate`. If the base knows the word, this is what an aligned model should draw without it. With
    `truth`, `gap_closed_…` tells where a model stands between base (0) and oracle (1)."""


class StopRuleConfig(Frozen):
    """The run ends when `metric` has been beyond the bound at `num_checks` checks in a row. Give exactly one bound."""

    metric: str
    """The metric as MLflow shows it, such as `guard/frechet_Flat`."""

    rises_by: PositiveFloat | None = None
    """Bound above the base model's value, as a share of it."""

    falls_by: PositiveFloat | None = None
    """Bound below the base model's value, as a share of it."""

    above: float | None = None
    """Upper bound."""

    below: float | None = None
    """Lower bound."""

    num_checks: Positive = 1
    """How many checks in a row must be beyond the bound."""

    @model_validator(mode="after")
    def _one_bound(self) -> StopRuleConfig:
        if len(self._bounds) != 1:
            raise ValueError(f"give one of rises_by, falls_by, above and below, not {len(self._bounds)}")
        return self

    @property
    def _bounds(self) -> dict[str, float]:
        given = {name: getattr(self, name) for name in ("rises_by", "falls_by", "above", "below")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def is_upper(self) -> bool:
        """Whether values above the bound violate the rule."""
        return self.rises_by is not None or self.above is not None

    @property
    def is_relative(self) -> bool:
        """Whether the bound is a share of the base model's value."""
        return self.rises_by is not None or self.falls_by is not None

    @property
    def summary(self) -> str:
        """The rule in a few words, for people.

        >>> StopRuleConfig(metric="guard/frechet_Flat", rises_by=0.5, num_checks=2).summary
        'rises_by 0.5 for 2 checks'
        """
        ((name, value),) = self._bounds.items()
        return f"{name} {value:g}" + (f" for {self.num_checks} checks" if self.num_checks > 1 else "")


class KeepBestConfig(Frozen):
    """Which check is the best one."""

    metric: str
    """The metric as MLflow shows it, such as `guard/frechet_wanted`."""

    goal: Literal["max", "min"]
    """Whether the highest or the lowest value is the best."""


class GuardConfig(Frozen):
    """Checks of a running training on pictures of its own, drawn as those of the evaluation are. They measure the
    distance to real pictures, statistics, diversity, drift from the base model and a held-out reward.

    `guard/damage` needs no real pictures: above 1, images have moved farther from the base model's than a change of
    style moves them. Its thresholds were found on the embedded default (`make alarms`), at 64 pixels.

    With `keep_best` the run exports the weights of its best check, the base model's among them. Without it, it exports
    those of its last step or, where a rule has ended it, of the last check at which no rule was violated.
    """

    every_num_steps: Positive = 10
    """The steps between two checks; there is one before the first and after the last step too."""

    prompts_path: PromptsPath | None = None
    """The prompts; files or benchmark as in `prompts.path`. null: some of the training prompts, never the
    evaluation's."""

    num_prompts: Annotated[int, Field(ge=2)] = 64
    """How many of the prompts are used; the seed draws them."""

    num_images_per_prompt: Positive = 1
    """The number of images of a prompt. From 2 on, `guard/diversity_seeds` says how much they differ."""

    held_out_reward: str | None = None
    """A reward that the service has and the run does not train on."""

    stop_when: tuple[StopRuleConfig, ...] = ()
    """Rules that end the run early. A rule that the base model already violates is an error."""

    keep_best: KeepBestConfig | None = None
    """Export the weights of the best check."""

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that rules and `keep_best` name: key in the run file -> metric."""
        named = {f"guard.stop_when.{index}.metric": rule.metric for index, rule in enumerate(self.stop_when)}
        return named | ({"guard.keep_best.metric": self.keep_best.metric} if self.keep_best else {})


class ComparisonConfig(Frozen):
    """What `srpo evaluate` does beside the section `evaluation`, whose prompts and sampling it uses: more pictures, and
    intervals from a bootstrap."""

    num_images_per_prompt: Positive = 2
    """The number of images of a prompt."""

    num_draws: Positive = 1000
    """How often the bootstrap draws the prompts, with replacement."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """The confidence level of the intervals."""

    num_viewing_pairs: NonNegative = 0
    """The pairs on the page of a blind viewing, base and first model with the sides shuffled; 0: no page. `srpo
    viewing` counts the choices that viewers save."""
