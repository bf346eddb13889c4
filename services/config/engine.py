"""The sections `optimizer`, `engine` and `checkpoint` of a run file: the updates, the workers and what they save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.fields import Frozen, Positive, PositiveFloat


class OptimizerConfig(Frozen):
    """AdamW's settings."""

    learning_rate: PositiveFloat
    """The learning rate; it is constant."""

    betas: tuple[float, float] = (0.9, 0.999)
    """The decay rates of AdamW's two averages."""

    epsilon: PositiveFloat = 1e-8
    """The number that AdamW adds to the root mean square of a parameter's gradient. A large one (with `max_grad_norm`
    above the norms that occur) lets small gradients make small steps, so that a run slows down as its images are
    satisfied."""

    weight_decay: float = 1e-4
    """AdamW's weight decay."""

    max_grad_norm: PositiveFloat = 0.1
    """A whole gradient that is longer is scaled down to this norm."""


class EngineConfig(Frozen):
    """How the training is spread over workers. A step gives the same result in every layout.

    True batches: `micro_batch` prompts a forward, `global_batch` prompts an optimizer step over all workers; gradients
    are accumulated over the forwards in between.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed's ZeRO shards: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well."""

    num_workers: Positive = 1
    """The number of processes, each on a GPU of its own with `use_gpu`."""

    micro_batch: Positive = 1
    """The number of prompts per forward and worker."""

    global_batch: Positive = 1
    """The number of prompts per optimizer step over all workers; a multiple of micro_batch × num_workers."""

    threads_per_worker: Positive = 1
    """The number of torch's CPU threads in each worker."""

    cpus_per_worker: PositiveFloat = 1.0
    """The CPUs that Ray reserves for each worker."""

    use_gpu: bool = False
    """Give each worker a GPU."""

    gradient_checkpointing: bool = False
    """Recompute transformer blocks and VAE decoder in the backward, which saves memory and costs time."""

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
        """The forward and backward passes per worker, branch and optimizer step."""
        return self.global_batch // (self.micro_batch * self.num_workers)


class CheckpointConfig(Frozen):
    """When checkpoints are written, and how many failures a run survives."""

    every_num_steps: Positive = 10
    """The steps between two checkpoints; there is one after the last step too. A restart repeats the steps since."""

    num_kept: Positive = 2
    """How many checkpoints are kept: the newest, or with a guard the best."""

    max_failures: Annotated[int, Field(ge=0)] = 2
    """How many deaths of workers a run survives. A worker that dies is replaced, and the run goes on from its last
    checkpoint. A mistake, such as a number that is not finite, ends the run at once with one line that names it."""
