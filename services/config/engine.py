"""The sections `optimizer`, `engine` and `checkpoint` of a run file: the updates, the workers and what they save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.config.fields import Frozen, NonNegative, Positive, PositiveFloat, Word


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

    max_skipped_updates: NonNegative = 10
    """How many updates in a row may be skipped because the gradient is not finite; one more ends the run. A skipped
    update leaves weights, AdamW's averages and the moving average as they are, and is printed and counted as the metric
    `skipped_updates`."""


class WorkersRange(Frozen):
    """Between how many workers a run may have. It starts with as many as fit, loses those whose node goes, and takes
    them back when there is room: global batch, noise and prompts stay the same, and so does the training."""

    min: Positive
    """The fewest workers with which the run goes on; with fewer it waits."""

    max: Positive
    """The most workers."""

    @model_validator(mode="after")
    def _rises(self) -> WorkersRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class EngineConfig(Frozen):
    """How the training is spread over workers. A step gives the same result in every layout.

    True batches: `micro_batch` prompts a forward, `global_batch` prompts an optimizer step over all workers; gradients
    are accumulated over the forwards in between.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed's ZeRO shards: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well."""

    num_workers: Positive | WorkersRange = 1
    """The number of processes, each on a GPU of its own with `use_gpu`; or a range such as {min: 1, max: 4}."""

    micro_batch: Positive = 1
    """The number of prompts per forward and worker."""

    global_batch: Positive = 1
    """The number of prompts per optimizer step over all workers; a multiple of micro_batch × num_workers, for each
    number of workers in a range."""

    threads_per_worker: Positive = 1
    """The number of torch's CPU threads in each worker."""

    cpus_per_worker: PositiveFloat = 1.0
    """The CPUs that Ray reserves for each worker."""

    memory_gib_per_worker: PositiveFloat | None = None
    """The memory of its node, in GiB, that Ray reserves for each worker, so that it puts no more workers on a node than
    fit. Ray does not hold a worker to it. null: Ray minds CPUs and GPUs only."""

    use_gpu: bool = False
    """Give each worker a GPU."""

    accelerator: Word | None = None
    """The GPU that the plan of a run compares with, by its name in the table of `srpo plan`, such as h100. null: the
    one in the machine from which the run is started, if there is one."""

    must_fit: bool = True
    """Refuse to start a run that by its plan cannot fit into the memory of its GPUs, or without GPUs of its host."""

    gradient_checkpointing: bool = False
    """Recompute transformer blocks and VAE decoder in the backward, which saves memory and costs time."""

    heartbeat_minutes: PositiveFloat = 15
    """How long a worker may take from one call of the model or request to the next. One that takes longer hangs: it
    prints where, ends, and is replaced as if it had died. Loading and writing models or checkpoints do not count."""

    @model_validator(mode="after")
    def _batches_divide(self) -> EngineConfig:
        for num_workers in range(self.min_workers, self.max_workers + 1):
            if self.global_batch % (self.micro_batch * num_workers):
                raise ValueError(
                    f"global_batch {self.global_batch} is not a multiple of "
                    f"micro_batch {self.micro_batch} × num_workers {num_workers}"
                )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run can have."""
        return self.num_workers.min if isinstance(self.num_workers, WorkersRange) else self.num_workers

    @property
    def max_workers(self) -> int:
        """The most workers that the run can have."""
        return self.num_workers.max if isinstance(self.num_workers, WorkersRange) else self.num_workers

    def num_micro_batches(self, num_workers: int) -> int:
        """Return the forward and backward passes per worker, branch and optimizer step."""
        return self.global_batch // (self.micro_batch * num_workers)


class CheckpointConfig(Frozen):
    """When checkpoints are written and where to, and how many failures a run survives."""

    every_num_steps: Positive = 10
    """The steps between two checkpoints; there is one after the last step too. What kills workers without warning costs
    the steps since the last one. A stop, a preemption notice and a change of the number of workers cost none."""

    storage: str | None = None
    """Where checkpoints are kept: a folder that all workers share, or a URI such as s3://bucket/folder or
    gs://bucket/folder, whose keys the environment holds. Each run has a folder of its own there. null: in the run's
    folder."""

    num_kept: Positive = 2
    """How many of the newest checkpoints are kept; with a guard also the best one."""

    max_failures: Annotated[int, Field(ge=0)] = 2
    """How many deaths of workers a run survives. A worker that dies is replaced, and the run goes on from its last
    checkpoint. A mistake, such as a prompt that a reward refuses, ends the run at once with one line that names it. A
    node that was taken away after a notice does not count."""
