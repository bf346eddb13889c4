"""The only DeepSpeed: a policy sharded over workers, several backwards to an optimiser step, saved and exported whole.

    engine = Engine.create(transformer, config.optimizer, config.engine, num_backwards=2, dtype=torch.float32)
    for loss in losses:  # forward, backward, forward, backward: see the warning at `backward`
        engine.backward(loss)
    grad_norm = engine.step()

Left out: offload to CPU or disk, LoRA, and resuming on another number of workers (needs DeepSpeed's universal format).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from services.config import EngineConfig, OptimizerConfig

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_TAG = "policy"


def init_distributed(use_gpu: bool) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE and MASTER_ADDR describe; returns this worker's device."""
    # DeepSpeed would compile this operator at every first start: 15 s, a compiler, and a lock file that a killed
    # worker leaves behind for the next one to wait on for ever. Only its inference engine uses it.
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of DeepSpeed's calls
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False)
    return device


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """The policy's weights out of what Engine.save wrote on however many workers, for a single process."""
    whole = folder / _TAG / "mp_rank_00_model_states.pt"
    if whole.is_file():  # stages 0 to 2
        weights: dict[str, Tensor] = torch.load(whole, map_location="cpu", weights_only=False)["module"]
        return weights
    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)


class Engine:
    """A policy and its optimiser under ZeRO. Every method is called on all workers, in the same order."""

    def __init__(self, deepspeed_engine: Any, zero_stage: int, num_backwards: int) -> None:
        self._deepspeed = deepspeed_engine
        self._zero_stage = zero_stage
        self._num_backwards = num_backwards
        self._num_pending = 0

    @classmethod
    def create(
        cls, policy: nn.Module, optimizer: OptimizerConfig, engine: EngineConfig, num_backwards: int, dtype: torch.dtype
    ) -> Engine:
        """Shard `policy` over the workers; `num_backwards` is the number of calls of `backward` to one `step`.

        Raises ValueError for bfloat16 in stage 0, where DeepSpeed's gradients are wrong from the second step on.
        """
        if dtype == torch.bfloat16 and engine.zero_stage == 0:
            raise ValueError("engine.zero_stage 0 cannot train a model.dtype of bfloat16: take stage 1, 2 or 3")
        settings = _settings(optimizer, engine, num_backwards, dtype)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        wrapped, *_ = deepspeed.initialize(model=policy, model_parameters=trainable, config=settings)
        return cls(wrapped, engine.zero_stage, num_backwards)

    @property
    def policy(self) -> nn.Module:
        """What to call in place of the policy, with gradient or without; the same number of calls on every worker."""
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
        """Clip, update, forget the gradients. Returns the norm of the whole gradient before clipping."""
        if self._num_pending != self._num_backwards:
            raise RuntimeError(f"{self._num_pending} backwards before a step, not {self._num_backwards}")
        plain_norm = self._plain_grad_norm()
        self._deepspeed.step()
        self._num_pending = 0
        return float(self._deepspeed.get_global_grad_norm()) if plain_norm is None else plain_norm

    def save(self, folder: Path, step: int) -> None:
        """Write this worker's part of the weights and of the optimiser's state; the parts share one folder."""
        self._deepspeed.save_checkpoint(str(folder), tag=_TAG, client_state={"step": step})

    def load(self, folder: Path) -> int:
        """Take up what `save` wrote, on the same number of workers. Returns its step."""
        if not (folder / _TAG).is_dir():
            raise FileNotFoundError(f"no checkpoint of a policy in {folder}")
        _, state = self._deepspeed.load_checkpoint(str(folder), tag=_TAG)
        return int(state["step"])

    def export(self, save: Callable[[nn.Module], None]) -> None:
        """Call `save` with the whole policy on worker 0, while the others wait."""
        module = self._deepspeed.module
        # without the gathering, stage 3 saves empty tensors and reports success
        with GatheredParameters(list(module.parameters()), enabled=self._zero_stage == 3):
            if dist.get_rank() == 0:
                save(module)
        dist.barrier()

    def _finish_pending_backward(self) -> None:
        if self._num_pending == self._num_backwards:
            raise RuntimeError(f"more than {self._num_backwards} backwards before a step")
        if self._num_pending:
            self._deepspeed.step()  # between backwards it only counts; the weights move at the last one

    def _plain_grad_norm(self) -> float | None:
        """Stage 0 keeps whole, already averaged gradients and tells no norm of them."""
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
