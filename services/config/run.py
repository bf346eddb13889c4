"""Read a run file: one YAML file becomes one frozen RunConfig, and a mistake in it an error that names the key.

Relative paths are taken from the folder in which the command was started. They are made absolute on load, because a
Ray Train worker runs in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from services.config.dataset import DatasetConfig
from services.config.engine import CheckpointConfig, EngineConfig, OptimizerConfig
from services.config.evaluation import ComparisonConfig, EvaluationConfig, GuardConfig
from services.config.fields import Frozen, Positive, describe_mistake
from services.config.finetune import EmaConfig, FinetuneConfig
from services.config.method import DirectAlignMethod, MethodConfig, check_method
from services.config.objective import ObjectiveConfig
from services.config.prompts import PromptsConfig
from services.config.rewards import RewardConfig, RewardServiceConfig, RunWordsConfig


class ConfigError(ValueError):
    """The run file cannot be used; the text names the file, the key and the offending value."""


Dtype = Literal["float32", "bfloat16"]


class ModelConfig(Frozen):
    """The model to train: a FLUX-type model in diffusers' format."""

    path: str
    """A folder, or a hub id such as black-forest-labs/FLUX.1-dev."""

    dtype: Dtype = "float32"
    """The number format of the forward. `bfloat16` needs `engine.zero_stage` 1 to 3: master weights, AdamW's averages,
    the moving average and sums of gradients are float32, as are sigmas, losses and reward gradients in any case."""

    vae_dtype: Dtype | None = None
    """The number format of the VAE, which decodes images and their gradient, and encodes a `dataset`. null: `dtype`."""

    text_encoder_dtype: Dtype | None = None
    """The number format of the text encoders and of encoded prompts. null: `dtype`."""

    height_px: Positive
    """The height of images in pixels."""

    width_px: Positive
    """The width of images in pixels."""

    sizes: tuple[tuple[Positive, Positive], ...] = ()
    """Several (height_px, width_px) for training, in place of the one above, which stays that of evaluation and guard.
    Each step has one of them. For rollouts it is drawn, all equally often. For a `dataset` the sizes are its buckets by
    aspect ratio, used as often as they have images."""

    max_sequence_length: Positive = 512
    """The number of T5 tokens per prompt."""

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
    """The sampling of training: from noise to image, without gradient."""

    num_steps: Positive = 25
    """The number of forwards of the policy from noise to image."""

    guidance_scale: float = 1.0
    """The guidance embedding. It is not classifier-free guidance: there is one forward a step."""

    shift: float | Literal["dynamic"] = 3.0
    """The shift of the sigmas, in evaluation and for the noise levels of training as well. `dynamic`: FLUX's own, by
    resolution."""

    dtype: Dtype | None = None
    """The number format of the rollouts' forwards. `bfloat16` under a `model.dtype` of float32 runs them under torch's
    autocast, which casts each layer's weights when it uses them; branches and evaluation stay in float32. null:
    `model.dtype`. `method.kind` grpo needs that, as it compares rollout and branches."""


class TrackingConfig(Frozen):
    """Where MLflow records the run. The record is kept in the run's folder first, and brought to MLflow while the run
    goes on; `srpo sync` brings what MLflow did not take meanwhile."""

    uri: str = "http://127.0.0.1:5000"
    """The address of an MLflow server, or sqlite:///FILE."""

    experiment: str = "srpo"
    """The name of the MLflow experiment."""

    spool_mib: Positive = 1024
    """What the record may take in the run's folder, in MiB. Above it pictures are left out until MLflow has taken some,
    a tenth above it numbers and tags as well; the run goes on."""

    log_model: Literal["never", "adapter", "always"] = "adapter"
    """What is uploaded to MLflow at the end: nothing, the adapter of a LoRA run, or the aligned model in any case (of a
    LoRA run the adapter too). The result is in the run's folder; an upload may fail without failing the run."""


class RunConfig(Frozen):
    """What a file holds: some keys of its own, and the sections below."""

    name: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/\\.][^\x00-\x1f/\\]{0,99}$")]
    """The run's name, also in MLflow: up to 100 characters without / and \\, not beginning with a dot."""

    seed: int = 0
    """The seed of everything that is drawn: prompts, levels, words and noise."""

    num_steps: Positive
    """The number of steps. Each is a rollout of `engine.global_batch` prompts and its update."""

    output_dir: Path = Path("outputs")
    """The run writes to a folder of its own, output_dir/name/RUN_ID: the aligned model as a folder that
    `FluxPipeline.from_pretrained` loads, evaluation.json, before_after.png and checkpoints. output_dir/name/latest
    leads to the newest run. All workers must share it."""

    model: ModelConfig
    """The model to train, and the size of its images."""

    prompts: PromptsConfig = PromptsConfig()
    """The training prompts."""

    dataset: DatasetConfig | None = None
    """Real images with captions, in place of `prompts.path`: offline training, without rollouts."""

    control_words: RunWordsConfig
    """The words toward which and away from which the run trains."""

    rollout: RolloutConfig = RolloutConfig()
    """The sampling of training."""

    method: MethodConfig = DirectAlignMethod()
    """How rewards become updates: Direct-Align, or a baseline with the same rewards, engine and randomness."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximized, and at which noise levels."""

    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    """One reward or several at once; each name may come once."""

    reward_service: RewardServiceConfig = RewardServiceConfig()
    """Where the rewards are computed."""

    optimizer: OptimizerConfig
    """AdamW."""

    finetune: FinetuneConfig = FinetuneConfig()
    """All weights or a LoRA adapter."""

    ema: EmaConfig | None = None
    """A moving average of the trained weights, which then is the run's result."""

    engine: EngineConfig = EngineConfig()
    """Workers, batches and devices."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and restarts."""

    evaluation: EvaluationConfig
    """Pictures of held-out prompts, during training and at its end."""

    guard: GuardConfig | None = None
    """Checks that may end a run early and choose its best weights."""

    comparison: ComparisonConfig = ComparisonConfig()
    """What `srpo evaluate` does beside."""

    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @property
    def vae_dtype(self) -> Dtype:
        """The dtype in which the VAE decodes and encodes."""
        return self.model.vae_dtype or self.model.dtype

    @property
    def text_encoder_dtype(self) -> Dtype:
        """The dtype in which prompts are encoded and kept."""
        return self.model.text_encoder_dtype or self.model.dtype

    @property
    def rollout_dtype(self) -> Dtype:
        """The dtype in which the transformer computes in rollouts."""
        return self.rollout.dtype or self.model.dtype

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
    def _rollouts_can_have_their_dtype(self) -> RunConfig:
        own, policy = self.rollout_dtype, self.model.dtype
        if own == "float32" and policy == "bfloat16":
            raise ValueError("rollout.dtype float32: weights in a model.dtype of bfloat16 have no more digits to give")
        if own != policy and self.method.kind == "grpo":
            raise ValueError(
                f"rollout.dtype {own} with a model.dtype of {policy}: method.kind grpo would take the difference for a "
                "change of the policy"
            )
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
            if reward.satisfied_at is not None and self.objective.kind in ("plain", "sgp"):
                raise ValueError(
                    f"rewards.{index}.satisfied_at {reward.satisfied_at} needs a difference of two similarities: "
                    f"objective.kind srp or srp_guided, not {self.objective.kind}"
                )
        return self


def load_run_config(path: Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file, with keys changed as by `--set`: ("num_steps=80", "rewards.0.weight=2").

    Raise ConfigError, which names file, key and value.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    for change in changes:
        _set(tree, change)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"{path}: {describe_mistake(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _set(tree: Any, change: str) -> None:
    """Change one key of a run file's tree in place: "engine.num_workers=2", or "rewards.0.weight=2"."""
    key, equals, text = change.partition("=")
    *path, last = key.split(".")
    try:
        value = yaml.safe_load(text)
        for part in path:
            tree = tree[int(part)] if isinstance(tree, list) else tree.setdefault(part, {})
        tree[int(last) if isinstance(tree, list) else last] = value
    except (yaml.YAMLError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ConfigError(f"--set {change}: no such key, or no value: {error}") from error
    if not equals:
        raise ConfigError(f"--set {change}: write KEY=VALUE, as in num_steps=80")
