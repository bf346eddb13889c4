"""Shard a policy over workers with ZeRO, train it, checkpoint it, export it whole. The only DeepSpeed.

    engine = Engine.create(transformer, config.optimizer, config.engine, num_backwards=2, dtype=torch.float32)
    for loss in losses:  # forward, backward, forward, backward: see the warning at `backward`
        engine.backward(loss)
    grad_norm = engine.step()

Only parameters that require gradient are trained and kept in checkpoints (lora.py freezes the others). Left out:
offload to CPU or disk, and resuming on another number of workers (needs DeepSpeed's universal format).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import EmaConfig
from trainer.model.ema import Average, averaged_weights

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_TAG = "policy"
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


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


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Read the trained weights that Engine.save wrote on any number of workers; their average if the run has one.

    Nothing in the files is executed: they may come from elsewhere.
    """
    whole = folder / _TAG / "mp_rank_00_model_states.pt"
    if whole.is_file():  # stages 0 to 2
        weights: dict[str, Tensor] = torch.load(whole, map_location="cpu", weights_only=True)["module"]
    else:
        with _tensors_only(), torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
    return weights | averaged_weights(folder)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch.load unpickle known classes only, even if DeepSpeed asks it to run whatever a file says."""
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TENSORS_ONLY)
        os.environ |= {} if before is None else {_TENSORS_ONLY: before}


class Engine:
    """A policy and its optimizer under ZeRO. Every method is called on all workers, in the same order."""

    def __init__(self, deepspeed_engine: Any, zero_stage: int, num_backwards: int, ema: EmaConfig | None) -> None:
        self._deepspeed = deepspeed_engine
        self._zero_stage = zero_stage
        self._num_backwards = num_backwards
        self._num_pending = 0
        module = deepspeed_engine.module
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._leaves_out_frozen = len(trained) < len(list(module.parameters()))
        self._average = Average(trained, ema.decay, self._read, self._written) if ema else None

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
        wrapped, *_ = deepspeed.initialize(model=transformer, model_parameters=trainable, config=settings)
        return cls(wrapped, engine.zero_stage, num_backwards, ema)

    @property
    def transformer(self) -> nn.Module:
        """Return what to call in place of the transformer, with gradient or without, equally often on every worker."""
        return self._deepspeed

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss / num_backwards; the step follows the mean over backwards and workers.

        Take one forward, then its backward: in stage 3 two forwards followed by two backwards lose a part of the
        gradient in silence.
        """
        self._finish_pending_backward()
        self._deepspeed.backward(loss)  # divides by gradient_accumulation_steps, which is num_backwards
        self._num_pending += 1

    def step(self) -> float:
        """Clip, update, clear the gradients. Return the norm of the whole gradient before clipping."""
        if self._num_pending != self._num_backwards:
            raise RuntimeError(f"{self._num_pending} backwards before a step, not {self._num_backwards}")
        plain_norm = self._plain_grad_norm()
        self._deepspeed.step()
        self._num_pending = 0
        if self._average is not None:
            self._average.update()
        return float(self._deepspeed.get_global_grad_norm()) if plain_norm is None else plain_norm

    def save(self, folder: Path, step: int) -> None:
        """Write this worker's part of weights, average and optimizer state; the parts share one folder."""
        self._deepspeed.save_checkpoint(
            str(folder), tag=_TAG, client_state={"step": step}, exclude_frozen_parameters=self._leaves_out_frozen
        )
        if self._average is not None:
            self._average.save(folder)

    def load(self, folder: Path) -> int:
        """Load what `save` wrote on the same number of workers. Return its step."""
        if not (folder / _TAG).is_dir():
            raise FileNotFoundError(f"no checkpoint of a policy in {folder}")
        is_strict = not self._leaves_out_frozen
        _, state = self._deepspeed.load_checkpoint(str(folder), tag=_TAG, load_module_strict=is_strict)
        if self._average is not None:
            self._average.load(folder)
        return int(state["step"])

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

    def _read(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's whole master weights in float32, on all workers."""
        if self._zero_stage < 3 and parameter.dtype == torch.float32:
            return parameter.data
        return safe_get_full_fp32_param(parameter)

    @contextmanager
    def _written(self, parameter: nn.Parameter, by_rank: int) -> Iterator[None]:
        """Let the parameter be whole within the context; afterwards all workers have it as worker `by_rank` left it."""
        if self._zero_stage == 3:
            with GatheredParameters([parameter], modifier_rank=by_rank):
                yield
        else:
            yield
            dist.broadcast(parameter.data, src=by_rank)

    def _finish_pending_backward(self) -> None:
        if self._num_pending == self._num_backwards:
            raise RuntimeError(f"more than {self._num_backwards} backwards before a step")
        if self._num_pending:
            self._deepspeed.step()  # between backwards it only counts; the weights move at the last one

    def _plain_grad_norm(self) -> float | None:
        """Return the norm in stage 0, which keeps whole, averaged gradients and reports none; None in other stages."""
        if self._zero_stage:
            return None
        grads = [parameter.grad for parameter in self._deepspeed.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def _settings(
    optimizer: OptimizerConfig, engine: EngineConfig, num_backwards: int, dtype: torch.dtype
) -> dict[str, Any]:
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
    }
