"""Every ZeRO stage computes what plain PyTorch computes on one process: gradients, norms, steps, saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from services.config import EngineConfig, OptimizerConfig
from tests.workers import in_workers

NUM_WORKERS = 2
NUM_BACKWARDS = 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.1)


def make_policy(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1)).to(dtype)


def batch(step: int, index: int, rank: int) -> Tensor:
    """(3, 6): the input of one backward on one worker."""
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1000 * step + 10 * index + rank))


def loss_of(policy: nn.Module, inputs: Tensor) -> Tensor:
    return policy(inputs.to(next(policy.parameters()).dtype)).float().square().mean()


def plain_steps(num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same training in ten lines of PyTorch: gradient norms and final weights."""
    policy = make_policy()
    adam = torch.optim.AdamW(policy.parameters(), OPTIMIZER.learning_rate, OPTIMIZER.betas, weight_decay=1e-4)
    norms = []
    for step in range(num_steps):
        losses = [loss_of(policy, batch(step, i, r)) for i in range(NUM_BACKWARDS) for r in range(NUM_WORKERS)]
        torch.stack(losses).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm)))
        adam.step()
        adam.zero_grad()
    return norms, policy.state_dict()


def make_engine(stage: int, dtype: torch.dtype = torch.float32) -> Any:
    from trainer.engine import Engine, init_distributed

    init_distributed(use_gpu=False)
    config = EngineConfig(zero_stage=stage, num_workers=NUM_WORKERS, global_batch=NUM_WORKERS)  # type: ignore[arg-type]
    return Engine.create(make_policy(dtype), OPTIMIZER, config, NUM_BACKWARDS, dtype)


def train(engine: Any, rank: int, steps: range) -> list[float]:
    norms = []
    for step in steps:
        for index in range(NUM_BACKWARDS):
            engine.backward(loss_of(engine.policy, batch(step, index, rank)))
        norms.append(engine.step())
    return norms


def check_stages(rank: int, folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        check_stage(rank, stage, folder)


def check_stage(rank: int, stage: int, folder: Path) -> None:
    norms, weights = plain_steps(3)
    engine = make_engine(stage)
    torch.testing.assert_close(train(engine, rank, range(2)), norms[:2], rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="0 backwards before a step, not 4"):
        engine.step()
    engine.save(folder / f"part{stage}", step=2)

    resumed = make_engine(stage)
    assert resumed.load(folder / f"part{stage}") == 2
    torch.testing.assert_close(train(resumed, rank, range(2, 3)), norms[2:], rtol=1e-5, atol=1e-7)
    resumed.export(lambda policy: torch.save(policy.state_dict(), folder / f"{stage}.pt"))
    exported = torch.load(folder / f"{stage}.pt")
    torch.testing.assert_close(exported, weights, rtol=0, atol=2e-5)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resumed.load(folder / "nowhere")


def check_trap(rank: int) -> None:
    """FACTS: two forwards before two backwards lose gradient in stage 3; ours, one by one, do not."""
    norms, _ = plain_steps(1)
    engine = make_engine(stage=3)
    losses = [loss_of(engine.policy, batch(0, index, rank)) for index in range(NUM_BACKWARDS)]
    for loss in losses:
        engine.backward(loss)
    trapped = engine.step()
    assert trapped != pytest.approx(norms[0], rel=1e-3), "DeepSpeed has mended it: the warning at backward can go"


def check_bfloat16(rank: int) -> None:
    norms, _ = plain_steps(2)
    with pytest.raises(ValueError, match="zero_stage 0"):
        make_engine(0, torch.bfloat16)
    for stage in (1, 2, 3):
        engine = make_engine(stage, torch.bfloat16)
        assert train(engine, rank, range(2)) == pytest.approx(norms, rel=0.05), f"stage {stage}"


def test_every_stage_equals_plain_torch_through_save_load_and_export(tmp_path: Path) -> None:
    in_workers(NUM_WORKERS, check_stages, tmp_path)


def test_two_forwards_before_their_backwards_are_wrong_in_stage_3() -> None:
    in_workers(NUM_WORKERS, check_trap)


def test_bfloat16_keeps_the_gradient() -> None:
    in_workers(NUM_WORKERS, check_bfloat16)
