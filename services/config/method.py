"""The section `method` of a run file: how rewards become updates, by Direct-Align or by a baseline to compare it with.

A baseline trains the sampler that it draws with (the rollout's steps, shift and guidance_scale). It has no noise levels
and no second branch: of the section `objective` it uses `kind`, which says what text is sent, and `truncate_timestep`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.fields import Frozen, Positive, PositiveFloat
from services.config.objective import ObjectiveConfig

_USED_BY_BASELINES = {"kind", "truncate_timestep"}


class DirectAlignMethod(Frozen):
    """SRPO's method, the default: inject known noise, make one step, recover the image (arXiv 2509.06942). The section
    `objective` has its keys."""

    kind: Literal["direct_align"] = "direct_align"
    """The name of this method."""


class ReflMethod(Frozen):
    """A baseline, ReFL (arXiv 2304.05977): a late step of the rollout predicts the image, with gradient."""

    kind: Literal["refl"]
    """The name of this method."""

    late_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The step is drawn from this last part of the rollout: steps 30 to 39 of 40 in the paper."""


class DraftLvMethod(Frozen):
    """A baseline, DRaFT-LV (arXiv 2309.17400): the last step is made from renoised copies of the rollout's image, with
    gradient."""

    kind: Literal["draft_lv"]
    """The name of this method."""

    num_renoisings: Positive = 2
    """How many renoised copies of each image are made, at the sigma before the last step."""


class GrpoMethod(Frozen):
    """A baseline, GRPO for flow matching (arXiv 2505.05470, 2505.07818): noisy sampling, groups of images of a prompt
    and a clipped ratio of densities. It uses no gradient of the reward."""

    kind: Literal["grpo"]
    """The name of this method."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """The number of images of a prompt. A forward holds micro_batch × group_size images."""

    noise_level: PositiveFloat = 0.7
    """a in a · sqrt(sigma / (1 − sigma)), the noise of a sampling step."""

    num_trained_steps: Positive = 4
    """How many sampling steps of each rollout are trained, one from each of as many equal parts of it. The first and
    the last step have no noise and cannot be trained."""

    num_updates: Positive = 1
    """How many optimizer steps share a rollout, each with an equal part of its trained steps."""

    clip_range: PositiveFloat = 1e-4
    """How far the ratio of densities may be from 1; it is taken per number of the latents."""

    @model_validator(mode="after")
    def _updates_share_the_steps(self) -> GrpoMethod:
        if self.num_trained_steps % self.num_updates:
            raise ValueError(
                f"num_trained_steps {self.num_trained_steps} is not a multiple of num_updates {self.num_updates}"
            )
        return self


MethodConfig = Annotated[DirectAlignMethod | ReflMethod | DraftLvMethod | GrpoMethod, Field(discriminator="kind")]


def check_method(method: MethodConfig, objective: ObjectiveConfig, num_rollout_steps: int) -> None:
    """Raise ValueError for keys that contradict each other, or that the method would ignore silently."""
    if isinstance(method, DirectAlignMethod):
        return
    for name, field in ObjectiveConfig.model_fields.items():
        if name not in _USED_BY_BASELINES and getattr(objective, name) != field.default:
            raise ValueError(f"objective.{name} is Direct-Align's: method.kind {method.kind} does not use it")
    if objective.kind == "srp_guided":
        raise ValueError(
            f"objective.kind srp_guided has a k for each noise level, and method.kind {method.kind} has no levels: "
            "take srp, sgp or plain"
        )
    least = method.num_trained_steps + 2 if isinstance(method, GrpoMethod) else 2
    if num_rollout_steps < least:
        raise ValueError(f"rollout.num_steps {num_rollout_steps}: method.kind {method.kind} needs {least} or more")
