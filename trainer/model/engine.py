"""Shard a policy over workers with ZeRO, train it, take up its training state, export it whole. The only DeepSpeed.

    engine = Engine.create(transformer, config.optimizer, config.engine, num_backwards=2, dtype=torch.float32)
    for loss in losses:  # forward, backward, forward, backward: see the warning at `backward`
        engine.backward(loss)
    grad_norm = engine.step()

Only parameters that require gradient are trained and kept in checkpoints (lora.py freezes the others). Each worker
writes its part of the training state (fragments.py), which any number of workers take up in any stage. No other file
imports DeepSpeed; shards.py knows where its optimizers keep what. Left out: offload to CPU or disk.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import EmaConfig
from trainer.model.ema import Average
from trainer.model.fragments import AVERAGE, MOMENTS, WEIGHTS, Fragments, open_fragments
from trainer.model.shards import Shards
from trainer.model.tensor_file import FilePlace

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def init_distributed(use_gpu: bool) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE and MASTER_ADDR describe. Return this worker's device."""
    # DeepSpeed would compile this operator at every first start: 15 s, a compiler, and a lock file that a killed
    # worker leaves behind for the next one to wait on for ever. Only its inference engine uses it.
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # raised by DeepSpeed's calls
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False)
    return device


class Engine:
    """A policy and its optimizer under ZeRO. Every method is called on all workers, in the same order."""

    def __init__(self, deepspeed_engine: Any, zero_stage: int, num_backwards: int, ema: EmaConfig | None) -> None:
        self._deepspeed = deepspeed_engine
        self._zero_stage = zero_stage
        self._num_backwards = num_backwards
        self._num_pending = 0
        trained = {name: each for name, each in deepspeed_engine.module.named_parameters() if each.requires_grad}
        self._shards = Shards(deepspeed_engine, trained, zero_stage)
        self._average = Average(self._shards, ema.decay) if ema else None

    @classmethod
    def create(
        cls,
        transformer: nn.Module,
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        num_backwards: int,
        dtype: torch.dtype,
        ema: EmaConfig | None = None,
    ) -> Engine:
        """Shard `transformer` over the workers; `num_backwards` is the number of calls of `backward` to one `step`.

        A bfloat16 policy is the rounded image of float32 master weights, which the optimizer moves (stages 1
        to 3; RunConfig refuses stage 0, where DeepSpeed's gradients are wrong from the second step on).
        """
        settings = _settings(optimizer, engine, num_backwards, dtype)
        trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        with redirect_stdout(StringIO()):  # stage 1 in bfloat16 prints the machine's memory, over and over
            wrapped, *_ = deepspeed.initialize(model=transformer, model_parameters=trainable, config=settings)
        return cls(wrapped, engine.zero_stage, num_backwards, ema)

    @property
    def transformer(self) -> nn.Module:
        """Return what to call in place of the transformer, with gradient or without, equally often on every worker."""
        return self._deepspeed

    @property
    def trained_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each trained parameter, whole, by name."""
        return self._shards.shapes

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss / num_backwards; the step follows the mean over backwards and workers.

        Take one forward, then its backward: in stage 3 two forwards followed by two backwards lose a part of the
        gradient in silence.
        """
        self._finish_pending_backward()
        self._deepspeed.backward(loss)  # divides by gradient_accumulation_steps, which is num_backwards
        self._num_pending += 1

    def step(self) -> float:
        """Clip, update, clear the gradients. Return the norm of the whole gradient before clipping.

        If it is not finite, weights, average and AdamW's state stay as they are, on all workers.
        """
        if self._num_pending != self._num_backwards:
            raise RuntimeError(f"{self._num_pending} backwards before a step, not {self._num_backwards}")
        with self._shards.lock:
            norm = self._plain_grad_norm()
            with nullcontext() if norm is None or math.isfinite(norm) else self._without_update():
                self._deepspeed.step()
            self._num_pending = 0
            norm = float(self._deepspeed.get_global_grad_norm()) if norm is None else norm
            if self._average is not None and math.isfinite(norm):
                self._average.update()
        return norm

    @torch.no_grad()
    def snapshot(self) -> Fragments:
        """Copy this worker's part of the training state to host memory. It waits for no other worker.

        It may be called from another thread; an update waits until it is done.
        """
        shards, average = self._shards, self._average
        with shards.lock:
            own = {name: shard for name, shard in shards.items() if shard.own}
            num_updates, values = shards.num_updates, {WEIGHTS: shards.weights()}
            for kind in MOMENTS if num_updates else ():
                values[kind] = {name: shards.moment(kind, shard, shard.own) for name, shard in own.items()}
            if average is not None:
                values[AVERAGE] = average.values
            copied = {kind: {name: _copied(tensors[name]) for name in own} for kind, tensors in values.items()}
            if self._deepspeed.device.type == "cuda":
                torch.cuda.synchronize(self._deepspeed.device)
        return Fragments(num_updates, shards.shapes, {name: shard.own for name, shard in own.items()}, copied)

    @torch.no_grad()
    def load(self, files: Sequence[FilePlace]) -> None:
        """Take up the training state that the snapshots of any number of workers, in any stage, wrote to `files`.

        All workers call this together. Raise ValueError, with a parameter's name, if the files lack one or a part of
        one, or are of another model; then nothing has changed.
        """
        shards, average = self._shards, self._average
        with shards.lock, open_fragments(files) as state:
            state.require(shards.shapes, has_average=average is not None)
            shards.begin(state.num_updates)
            for name, shard in shards.items():
                shard.view(shard.flat, shard.held).copy_(state.read(WEIGHTS, name, shard.held))
                for kind in state.kinds.intersection(MOMENTS):
                    shards.moment(kind, shard, shard.held).copy_(state.read(kind, name, shard.held))
                if average is not None:
                    average.values[name].copy_(state.read(AVERAGE, name, shard.own))
            shards.show()

    @torch.no_grad()
    def replace_weights(self, read: Callable[[str], Tensor]) -> None:
        """Give policy and average other trained weights: `read` returns a parameter's, whole. All workers call this.

        AdamW's state stays as it is: this is for weights that are drawn with and exported. Raise ValueError for a
        weight of another shape.
        """
        shards = self._shards
        with shards.lock:
            for name, shape in shards.shapes.items():  # on every worker, so that all of them raise
                whole = read(name)
                if tuple(whole.shape) != shape:
                    raise ValueError(f"{name} is {tuple(whole.shape)}, the policy's is {shape}")
                if (shard := shards.of(name)) is not None:
                    shard.view(shard.flat, shard.held).copy_(whole.reshape(-1)[shard.held.start : shard.held.stop])
                    if self._average is not None:
                        self._average.values[name].copy_(shard.weights)
            shards.show()

    def averaged(self) -> AbstractContextManager[None]:
        """Let the policy have its averaged weights, if there are any, within the context: for drawing and export."""
        return self._average.in_force() if self._average is not None else nullcontext()

    def export(self, save: Callable[[nn.Module], None]) -> None:
        """Call `save` with the whole policy, averaged, on worker 0, while the others wait."""
        module = self._deepspeed.module
        # without the gathering, stage 3 saves empty tensors and reports success
        with self.averaged(), GatheredParameters(list(module.parameters()), enabled=self._zero_stage == 3):
            if dist.get_rank() == 0:
                save(module)
        dist.barrier()

    def _finish_pending_backward(self) -> None:
        if self._num_pending == self._num_backwards:
            raise RuntimeError(f"more than {self._num_backwards} backwards before a step")
        if self._num_pending:
            self._deepspeed.step()  # between backwards it only counts; the weights move at the last one

    @contextmanager
    def _without_update(self) -> Iterator[None]:
        """Let AdamW find no gradient in stage 0. In the others DeepSpeed skips an update that is not finite itself."""
        hook = self._deepspeed.basic_optimizer.register_step_pre_hook(lambda adam, *_: adam.zero_grad())
        yield
        hook.remove()

    def _plain_grad_norm(self) -> float | None:
        """Return the norm in stage 0, which keeps whole, averaged gradients and reports none; None in other stages."""
        if self._zero_stage:
            return None
        grads = [parameter.grad for parameter in self._deepspeed.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def _settings(
    optimizer: OptimizerConfig, engine: EngineConfig, num_backwards: int, dtype: torch.dtype
) -> dict[str, Any]:
    # without it, bfloat16 gradients are summed in bfloat16, over backwards and over workers
    summed_in_float32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": num_backwards,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": engine.zero_stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": optimizer.epsilon,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # the others are compiled on first use, for minutes
            },
        },
        "steps_per_print": None,
        **(summed_in_float32 if dtype == torch.bfloat16 else {}),
    }


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, of a GPU's tensor once the GPU has come so far."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
