"""One YAML file -> one frozen RunConfig; an unknown key is an error that names the key.

Relative paths are taken from the folder in which the command was started and made absolute on load, because a
Ray Train worker runs in a folder of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Ramp = tuple[float, float]  # value at the first and at the last level, linear between


class ConfigError(ValueError):
    """The run file cannot be used; the text names the file, the key and the offending value."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """A FLUX-type model in diffusers' format: a folder, or a hub id such as black-forest-labs/FLUX.1-dev."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    height_px: Positive
    width_px: Positive
    max_sequence_length: Positive = 512  # T5 tokens per prompt


class PromptsConfig(_Frozen):
    path: Path  # one prompt a line


class ControlWordsConfig(_Frozen):
    positive: Annotated[str, Field(min_length=1)]
    negative: Annotated[str, Field(min_length=1)]


class RolloutConfig(_Frozen):
    num_steps: Positive = 25
    guidance_scale: float = 1.0
    shift: float | Literal["dynamic"] = 3.0  # "dynamic": FLUX's own, by resolution


class ObjectiveConfig(_Frozen):
    """METHOD.md, published schedule: levels on a piece of the shifted sigma grid, one shared target a step."""

    train_guidance_scale: float = 3.5
    num_grid_steps: Positive = 50
    grid_index_range: tuple[int, int] = (5, 25)
    num_levels: Positive = 1000
    level_range: tuple[int, int] = (5, 995)  # the training level m is drawn uniformly from it
    num_delta_levels: Positive = 100  # Δσ in levels, shrunk near both ends
    preference_scale_denoise: Ramp = (0.1, 0.25)
    preference_scale_invert: Ramp = (0.3, 0.01)
    margin: float = 0.7
    # An image whose plain difference of similarities under the wanted pair (k = 0) has reached this is done: neither
    # branch pushes it further. Real pictures of the wanted kind say where; beyond them lies reward hacking.
    satisfied_at: float | None = None  # None: never


class RewardConfig(_Frozen):
    name: str  # one of those that the service lists at /v1/models
    url: str = "http://127.0.0.1:8000"
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_attempts: Positive = 8


class OptimizerConfig(_Frozen):
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.999)
    # AdamW's, beside the root mean square of a parameter's gradient. A large one (with max_grad_norm above the norms
    # that occur) lets small gradients make small steps, so that a run slows down as its images are satisfied.
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.1


class EngineConfig(_Frozen):
    zero_stage: Literal[0, 1, 2, 3] = 2
    num_workers: Positive = 1
    micro_batch: Positive = 1  # prompts per forward and worker
    global_batch: Positive = 1  # prompts per optimiser step over all workers
    threads_per_worker: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    use_gpu: bool = False
    gradient_checkpointing: bool = False

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


class CheckpointConfig(_Frozen):
    every_num_steps: Positive = 10
    num_kept: Positive = 2
    max_failures: Annotated[int, Field(ge=0)] = 2  # worker deaths that a run survives


class EvaluationConfig(_Frozen):
    """Fixed prompts and seeds; judges are for evaluation only and never give a gradient."""

    prompts_path: Path  # held out from training
    num_images_per_prompt: Positive = 1
    num_grid_images: Positive = 24  # in the sample grids of a running training
    num_steps: Positive = 25
    guidance_scale: float = 3.5
    every_num_steps: Positive = 20  # sample grids during training
    batch: Positive = 32
    judge_path: Path | None = None  # folder with style/, subject/ and reference.safetensors


class TrackingConfig(_Frozen):
    uri: str = "http://127.0.0.1:5000"
    experiment: str = "srpo"


class RunConfig(_Frozen):
    name: str
    seed: int = 0
    num_steps: Positive
    output_dir: Path = Path("outputs")  # the run writes to output_dir/name
    model: ModelConfig
    prompts: PromptsConfig
    control_words: ControlWordsConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig
    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig
    tracking: TrackingConfig = TrackingConfig()


def load_run_config(path: Path) -> RunConfig:
    """Read and check a run file. Raises ConfigError naming file, key and value."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']} (got {item['input']!r})"
            for item in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from error
