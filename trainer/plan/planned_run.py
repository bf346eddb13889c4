"""Take from a run file what memory and time depend on, as one flat set of numbers that a plan may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.config.method import DraftLvMethod, GrpoMethod
from services.config.run import RunConfig
from trainer.plan.tape import FLOAT32_BYTES
from trainer.plan.training import Training

_ITEMSIZES = {"float32": FLOAT32_BYTES, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"int8": 1.01, "nf4": 0.53}  # of a number, with the scales of its block (of 64 and 256 for nf4)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run as the planner sees it. *_itemsize: bytes of a number. checkpointing: every how many-th block, 0: none.

    num_forwards: forwards with gradient in an update of a worker; each has a backward. rollout_batch: images of a
    forward. num_prompts: those whose embeddings a worker keeps on its device.
    """

    num_steps: int
    num_workers: int
    gpus_per_host: int
    use_gpu: bool
    zero_stage: int
    itemsize: int
    vae_itemsize: int
    text_itemsize: int
    rollout_itemsize: int
    checkpointing: int
    is_lora: bool
    rank: int
    targets: tuple[str, ...]
    has_ema: bool
    sizes: tuple[tuple[int, int], ...]
    evaluation_size: tuple[int, int]
    num_text_tokens: int
    micro_batch: int
    num_rollouts: int
    num_rollout_steps: int
    num_forwards: int
    num_updates: int
    has_decoder_gradient: bool
    rewards: tuple[str, ...]
    encodes_prompts: bool
    num_prompts: int
    evaluation_batch: int
    num_evaluation_steps: int
    num_evaluation_images: int
    num_checkpoints_kept: int
    rolls_out: bool = True
    quantization: str | None = None  # no key sets it or the next one so far
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, num_evaluation_prompts: int, gpus_per_host: int) -> PlannedRun:
        """Take what a run needs on the fewest of its workers, each of which then holds most."""
        engine, model, method, objective = config.engine, config.model, config.method, config.objective
        workers = engine.min_workers
        num_micro = engine.num_micro_batches(workers)
        group = method.group_size if isinstance(method, GrpoMethod) else 1
        evaluation, images = config.evaluation, num_evaluation_prompts * config.evaluation.num_images_per_prompt
        drawn = config.num_steps * engine.global_batch // workers
        forwards = _num_forwards(config)
        return cls(
            num_steps=config.num_steps,
            num_workers=workers,
            gpus_per_host=min(gpus_per_host, workers),
            use_gpu=engine.use_gpu,
            zero_stage=engine.zero_stage,
            itemsize=_ITEMSIZES[model.dtype],
            vae_itemsize=_ITEMSIZES[config.vae_dtype],
            text_itemsize=_ITEMSIZES[config.text_encoder_dtype],
            rollout_itemsize=_ITEMSIZES[config.rollout_dtype],
            checkpointing=int(engine.gradient_checkpointing),
            is_lora=config.finetune.kind == "lora",
            rank=config.finetune.rank,
            targets=config.finetune.target_modules,
            has_ema=config.ema is not None,
            sizes=model.training_sizes,
            evaluation_size=(model.height_px, model.width_px),
            num_text_tokens=model.max_sequence_length,
            micro_batch=engine.micro_batch * group,
            num_rollouts=num_micro,
            num_rollout_steps=config.rollout.num_steps,
            num_forwards=num_micro * forwards,
            num_updates=objective.num_injections if objective.update_per_injection else 1,
            has_decoder_gradient=not isinstance(method, GrpoMethod),
            rewards=tuple(each.name for each in config.rewards),
            encodes_prompts=config.prompts.embeddings_path is None,
            num_prompts=0 if config.prompts.embeddings_path else drawn + -(-num_evaluation_prompts // workers),
            evaluation_batch=min(evaluation.batch, max(1, -(-images // workers))),
            num_evaluation_steps=evaluation.num_steps,
            num_evaluation_images=_num_drawn(config, images),
            num_checkpoints_kept=config.checkpoint.num_kept + (config.guard is not None),
            rolls_out=config.dataset is None,
        )

    @property
    def training(self) -> Training:
        return Training.adapter(self.rank, self.targets) if self.is_lora else Training.full()

    @property
    def base_bytes(self) -> float:
        """Bytes of a number of the frozen base of a LoRA run."""
        return _QUANTIZED_BYTES[self.quantization] if self.quantization else self.itemsize


def _num_forwards(config: RunConfig) -> int:
    """Return the forwards with gradient of a rollout, over all its updates."""
    method, objective = config.method, config.objective
    if method.kind == "direct_align":
        return len(objective.branches) * objective.num_injections
    if isinstance(method, GrpoMethod):
        return method.num_trained_steps
    return method.num_renoisings if isinstance(method, DraftLvMethod) else 1


def _num_drawn(config: RunConfig, num_images: int) -> int:
    """Return the images that evaluations, grids and guard draw in a whole run."""
    evaluation, guard, steps = config.evaluation, config.guard, config.num_steps
    grids = (steps - 1) // evaluation.every_num_steps
    drawn = num_images * (3 if evaluation.draws_oracle else 2) + grids * min(evaluation.num_grid_images, num_images)
    if guard is not None:
        checks = 1 + -(-steps // guard.every_num_steps)
        drawn += checks * guard.num_prompts * guard.num_images_per_prompt
    return drawn
