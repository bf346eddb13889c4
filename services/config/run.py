"""One YAML file -> one frozen RunConfig; an unknown key is an error that names the key.

Relative paths are taken from the folder in which the command was started and made absolute on load, because a
Ray Train worker runs in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from services.config.dataset import DatasetConfig
from services.config.finetune import EmaConfig, FinetuneConfig
from services.config.method import DirectAlignMethod, MethodConfig, check_method
from services.config.objective import (
    Frozen,
    ObjectiveConfig,
    Positive,
    RewardConfig,
    RewardServiceConfig,
    RunWordsConfig,
)
from services.config.prompts import PromptsConfig, PromptsPath


class ConfigError(ValueError):
    """The run file cannot be used; the text names the file, the key and the offending value."""


class ModelConfig(Frozen):
    """A FLUX-type model in diffusers' format: a folder, or a hub id such as black-forest-labs/FLUX.1-dev."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    height_px: Positive
    width_px: Positive
    # (height_px, width_px) of training, in place of the one size above, which stays that of evaluation and guard. Each
    # step has one of them: all equally often for rollouts; for a dataset, whose buckets they are, by number of images.
    sizes: tuple[tuple[Positive, Positive], ...] = ()
    max_sequence_length: Positive = 512  # T5 tokens per prompt

    @model_validator(mode="after")
    def _sizes_differ(self) -> ModelConfig:
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes: each size may come once, not {list(self.sizes)}")
        return self

    @property
    def training_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height_px, width_px) of training steps, one at least."""
        return self.sizes or ((self.height_px, self.width_px),)


class RolloutConfig(Frozen):
    num_steps: Positive = 25  # forwards of the policy from noise to image, without gradient
    guidance_scale: float = 1.0  # the guidance embedding, not classifier-free guidance: one forward a step
    # Of the sigmas, in evaluation and for the noise levels of training as well; "dynamic": FLUX's own, by resolution.
    shift: float | Literal["dynamic"] = 3.0


class OptimizerConfig(Frozen):
    learning_rate: Annotated[float, Field(gt=0)]  # AdamW's, constant
    betas: tuple[float, float] = (0.9, 0.999)
    # AdamW's, beside the root mean square of a parameter's gradient. A large one (with max_grad_norm above the norms
    # that occur) lets small gradients make small steps, so that a run slows down as its images are satisfied.
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.1  # the whole gradient is scaled down to this norm


class EngineConfig(Frozen):
    zero_stage: Literal[0, 1, 2, 3] = 2  # 0 shards nothing, 1 the optimiser, 2 gradients as well, 3 weights as well
    num_workers: Positive = 1  # processes, each on a GPU of its own with use_gpu
    micro_batch: Positive = 1  # prompts per forward and worker
    global_batch: Positive = 1  # prompts per optimiser step over all workers
    threads_per_worker: Positive = 1  # of torch
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0  # what Ray sets aside
    use_gpu: bool = False
    gradient_checkpointing: bool = False  # recompute transformer blocks and VAE decoder in the backward

    @model_validator(mode="after")
    def _batches_divide(self) -> EngineConfig:
        if self.global_batch % (self.micro_batch * self.num_workers):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of "
                f"micro_batch {self.micro_batch} × num_workers {self.num_workers}"
            )
        return self

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes per worker, branch and optimiser step."""
        return self.global_batch // (self.micro_batch * self.num_workers)


class CheckpointConfig(Frozen):
    every_num_steps: Positive = 10  # and after the last step; a restart repeats the steps since
    num_kept: Positive = 2  # the newest ones, or with a guard its best
    max_failures: Annotated[int, Field(ge=0)] = 2  # worker deaths that a run survives


class EvaluationConfig(Frozen):
    """Fixed prompts and seeds; judges are for evaluation only and never give a gradient."""

    prompts_path: PromptsPath  # held out from training
    num_images_per_prompt: Positive = 1  # each with noise of its own
    num_grid_images: Positive = 24  # in the sample grids of a running training
    num_steps: Positive = 25  # of sampling, as guidance_scale: FLUX.1-dev's own
    guidance_scale: float = 3.5
    every_num_steps: Positive = 20  # sample grids during training
    batch: Positive = 32  # images drawn, judged and scored at once, by each worker
    judge_path: Path | None = None  # folder with style/, subject/ and reference.safetensors
    reference_path: Path | None = None  # folder of real pictures; the distance to them is frechet_reference


class StopRuleConfig(Frozen):
    """A run ends where `metric` has been beyond the bound at `num_checks` checks on end; exactly one bound is given."""

    metric: str  # as MLflow shows it, such as guard/frechet_Flat
    rises_by: Annotated[float, Field(gt=0)] | None = None  # above the base model's value, as a share of it
    falls_by: Annotated[float, Field(gt=0)] | None = None  # below the base model's value, as a share of it
    above: float | None = None
    below: float | None = None
    num_checks: Positive = 1

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
        return self.rises_by is not None or self.above is not None

    @property
    def is_relative(self) -> bool:
        return self.rises_by is not None or self.falls_by is not None

    @property
    def told(self) -> str:
        """
        >>> StopRuleConfig(metric="guard/frechet_Flat", rises_by=0.5, num_checks=2).told
        'rises_by 0.5 for 2 checks'
        """
        ((name, value),) = self._bounds.items()
        return f"{name} {value:g}" + (f" for {self.num_checks} checks" if self.num_checks > 1 else "")


class KeepBestConfig(Frozen):
    metric: str
    goal: Literal["max", "min"]


class GuardConfig(Frozen):
    """Checks of the policy on its way, on pictures of its own. They are drawn as the evaluation's are.

    With `keep_best` the run gives the weights of its best check, the base model's among them; without it, those of its
    last step, or where a rule has ended it, of the last check at which no rule was violated.
    """

    every_num_steps: Positive = 10  # and before the first and after the last step
    prompts_path: PromptsPath | None = None  # None: some of the training prompts; never the evaluation's
    num_prompts: Annotated[int, Field(ge=2)] = 64  # drawn by the seed
    num_images_per_prompt: Positive = 1  # from 2 on, guard/diversity_seeds tells how they differ
    held_out_reward: str | None = None  # a reward that the service has and the run does not train on
    stop_when: tuple[StopRuleConfig, ...] = ()
    keep_best: KeepBestConfig | None = None

    @property
    def metrics(self) -> dict[str, str]:
        """What rules and `keep_best` name: key in the run file -> metric."""
        named = {f"guard.stop_when.{index}.metric": rule.metric for index, rule in enumerate(self.stop_when)}
        return named | ({"guard.keep_best.metric": self.keep_best.metric} if self.keep_best else {})


class ComparisonConfig(Frozen):
    """`srpo evaluate`: evaluation's prompts and sampling, with more pictures and intervals from a bootstrap."""

    num_images_per_prompt: Positive = 2
    num_draws: Positive = 1000  # of the prompts, with replacement
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of the intervals


class TrackingConfig(Frozen):
    uri: str = "http://127.0.0.1:5000"  # of an MLflow server, or sqlite:///FILE
    experiment: str = "srpo"


class RunConfig(Frozen):
    name: str
    seed: int = 0  # of all that is drawn: prompts, levels, words, noise
    num_steps: Positive  # each a rollout of global_batch prompts and its update
    output_dir: Path = Path("outputs")  # the run writes to output_dir/name
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()
    dataset: DatasetConfig | None = None  # real images in place of prompts.path, and no rollout in training
    control_words: RunWordsConfig
    rollout: RolloutConfig = RolloutConfig()
    method: MethodConfig = DirectAlignMethod()
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    reward_service: RewardServiceConfig = RewardServiceConfig()
    optimizer: OptimizerConfig
    finetune: FinetuneConfig = FinetuneConfig()
    ema: EmaConfig | None = None
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig
    guard: GuardConfig | None = None
    comparison: ComparisonConfig = ComparisonConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> RunConfig:
        if (self.prompts.path is None) == (self.dataset is None):
            given = "neither" if self.dataset is None else "both (a dataset's captions are its prompts)"
            raise ValueError(f"give either prompts.path, to roll out, or dataset, to train on real images, not {given}")
        return self

    @model_validator(mode="after")
    def _levels_are_between_noise_and_image(self) -> RunConfig:
        first, last, num_steps = *self.objective.grid_index_range, self.objective.num_grid_steps
        if self.objective.sigma_range is None and not 0 < first < last < num_steps:
            raise ValueError(
                f"objective.grid_index_range must rise within (0, {num_steps}), not {(first, last)}: at its ends "
                "sigma is 1, where nothing can be recovered, and 0, where there is nothing to train"
            )
        return self

    @model_validator(mode="after")
    def _stage_trains_the_dtype(self) -> RunConfig:
        if self.model.dtype == "bfloat16" and self.engine.zero_stage == 0:  # DeepSpeed's gradients are wrong there
            raise ValueError("engine.zero_stage 0 cannot train a model.dtype of bfloat16: take stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> RunConfig:
        check_method(self.method, self.objective, self.rollout.num_steps)
        if self.dataset is not None and self.method.kind != "direct_align":
            raise ValueError(f"method.kind {self.method.kind} trains on its rollouts: give prompts.path, not dataset")
        return self

    @model_validator(mode="after")
    def _rewards_fit_together(self) -> RunConfig:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: each name may come once, not {names}")
        for index, reward in enumerate(self.rewards):
            if reward.satisfied_at is not None and self.objective.kind in ("direct_align", "sgp"):
                raise ValueError(
                    f"rewards.{index}.satisfied_at {reward.satisfied_at} needs a difference of two similarities: "
                    f"objective.kind srp or srp_guided, not {self.objective.kind}"
                )
        return self


def load_run_config(path: Path) -> RunConfig:
    """Read and check a run file. Raises ConfigError naming file, key and value."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_line(item)}" for item in error.errors())) from error


def _line(item: Mapping[str, Any]) -> str:
    place = ".".join(map(str, item["loc"])) or "file"
    got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"  # a section's message has the numbers
    return f"{place}: {item['msg']}{got}"
