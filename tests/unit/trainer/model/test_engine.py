"""Every ZeRO stage computes what plain PyTorch computes on one process: gradients, norms, steps, saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import EmaConfig
from tests.engine_bytes import check_bytes
from tests.workers import in_workers
from trainer.model.fragments import checkpoint_weights, open_fragments

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


def plain_steps(num_steps: int) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The same training in ten lines of PyTorch: gradient norms, and the weights before and after each step."""
    policy = make_policy()
    weights = [{name: tensor.clone() for name, tensor in policy.state_dict().items()}]
    adam = torch.optim.AdamW(policy.parameters(), OPTIMIZER.learning_rate, OPTIMIZER.betas, weight_decay=1e-4)
    norms = []
    for step in range(num_steps):
        losses = [loss_of(policy, batch(step, i, r)) for i in range(NUM_BACKWARDS) for r in range(NUM_WORKERS)]
        torch.stack(losses).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm)))
        adam.step()
        adam.zero_grad()
        weights.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    return norms, weights


def make_engine(
    stage: int,
    dtype: torch.dtype = torch.float32,
    ema: EmaConfig | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    policy: nn.Module | None = None,
) -> Any:
    from trainer.model.engine import Engine, init_distributed

    init_distributed(use_gpu=False)
    config = EngineConfig(zero_stage=stage, num_workers=NUM_WORKERS, global_batch=NUM_WORKERS)  # type: ignore[arg-type]
    return Engine.create(policy or make_policy(dtype), optimizer, config, NUM_BACKWARDS, dtype, ema)


def train(engine: Any, rank: int, steps: range) -> list[float]:
    norms = []
    for step in steps:
        for index in range(NUM_BACKWARDS):
            engine.backward(loss_of(engine.transformer, batch(step, index, rank)))
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
    files = saved(engine, rank, folder / f"part{stage}")

    resumed = make_engine(stage)
    resumed.load(files)
    torch.testing.assert_close(train(resumed, rank, range(2, 3)), norms[2:], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(whole_of(resumed, folder), weights[3], rtol=0, atol=2e-5)
    torch.testing.assert_close(checkpoint_weights(files), weights[2], rtol=0, atol=2e-5)


def saved(engine: Any, rank: int, folder: Path) -> list[Path]:
    """The files of all workers' snapshots."""
    engine.snapshot().save(folder / f"{rank}.safetensors")
    dist.barrier()
    return sorted(folder.glob("*.safetensors"))


def check_trap(rank: int) -> None:
    """FACTS: two forwards before two backwards lose gradient in stage 3; ours, one by one, do not."""
    norms, _ = plain_steps(1)
    engine = make_engine(stage=3)
    losses = [loss_of(engine.transformer, batch(0, index, rank)) for index in range(NUM_BACKWARDS)]
    for loss in losses:
        engine.backward(loss)
    trapped = engine.step()
    assert trapped != pytest.approx(norms[0], rel=1e-3), "DeepSpeed has mended it: the warning at backward can go"


def check_bfloat16(rank: int) -> None:
    norms, _ = plain_steps(2)
    for stage in (1, 2, 3):
        engine = make_engine(stage, torch.bfloat16)
        assert train(engine, rank, range(2)) == pytest.approx(norms, rel=0.05), f"stage {stage}"


def check_bfloat16_sums(rank: int) -> None:
    """256 + 1 is 256 in bfloat16: gradients of both must be summed in more, over backwards and over workers."""
    for stage in (1, 2, 3):
        engine = make_engine(stage, torch.bfloat16, policy=nn.Linear(64, 1, bias=False).bfloat16())
        for index in range(NUM_BACKWARDS):
            gradient = 256.0 if (rank, index) == (0, 0) else 1.0
            engine.backward(engine.transformer(torch.full((1, 64), gradient, dtype=torch.bfloat16)).sum())
        mean = (256 + NUM_WORKERS * NUM_BACKWARDS - 1) / (NUM_WORKERS * NUM_BACKWARDS)
        assert engine.step() == pytest.approx(mean * 64**0.5, rel=1e-4), f"stage {stage}"


def check_master_weights(rank: int, folder: Path) -> None:
    """Steps of 1e-4 are less than half of what bfloat16 tells apart above 0.13: rounded one by one, all are lost."""
    slow = OptimizerConfig(learning_rate=1e-4, weight_decay=0)
    start = make_policy(torch.bfloat16).state_dict()["0.weight"].float()
    large = start.abs() > 0.13
    for stage in (1, 2, 3):
        engine = make_engine(stage, torch.bfloat16, EmaConfig(decay=0.75), optimizer=slow)
        train(engine, rank, range(1))
        kept = engine.snapshot().values
        assert set(kept) == {"weights", "exp_avg", "exp_avg_sq", "average"}
        assert {each.dtype for values in kept.values() for each in values.values()} == {torch.float32}
        with open_fragments(saved(engine, rank, folder / f"{stage}")) as state:
            master, average = (
                state.read(kind, "0.weight", range(start.numel())).view(start.shape) for kind in ("weights", "average")
            )
        torch.testing.assert_close(average, 0.75 * start + 0.25 * master, rtol=0, atol=1e-7)
        assert ((master - start).abs()[large] > 5e-5).float().mean() > 0.9, "the masters keep the step"
        assert master.bfloat16().float()[large].equal(start[large]), "which is too small for bfloat16"
        train(engine, rank, range(1, 20))
        assert (whole_of(engine, folder)["0.weight"].float() != start)[large].float().mean() > 0.5, "many add up"


def check_average(rank: int, folder: Path) -> None:
    _, weights = plain_steps(3)
    averaged = weights[0]
    for after in weights[1:]:
        averaged = {name: 0.75 * value + 0.25 * after[name] for name, value in averaged.items()}
    assert (weights[3]["0.weight"] - averaged["0.weight"]).abs().max() > 1e-3, "they can be told apart"
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage, ema=EmaConfig(decay=0.75))
        train(engine, rank, range(2))
        files = saved(engine, rank, folder / f"{stage}")
        resumed = make_engine(stage, ema=EmaConfig(decay=0.75))
        resumed.load(files)
        train(resumed, rank, range(2, 3))
        before = computed(resumed.transformer, rank)
        torch.testing.assert_close(before, computed(with_weights(weights[3]), rank), rtol=0, atol=1e-4)
        torch.testing.assert_close(whole_of(resumed, folder), averaged, rtol=0, atol=2e-5)
        with resumed.averaged():
            now = computed(resumed.transformer, rank)
            torch.testing.assert_close(now, computed(with_weights(averaged), rank), rtol=0, atol=1e-4)
        assert computed(resumed.transformer, rank).equal(before), "training goes on from where it was"
        without = saved(make_engine(stage), rank, folder / f"without{stage}")
        with pytest.raises(ValueError, match=r"has no average of \d.(weight|bias): was it made without ema"):
            resumed.load(without)


def whole_of(engine: Any, folder: Path) -> dict[str, Tensor]:
    """What the engine exports, on every worker."""
    engine.export(lambda policy: torch.save(policy.state_dict(), folder / "whole.pt"))
    weights = dict(torch.load(folder / "whole.pt"))
    dist.barrier()
    return weights


def with_weights(weights: dict[str, Tensor]) -> nn.Module:
    policy = make_policy()
    policy.load_state_dict(weights)
    return policy


@torch.no_grad()
def computed(policy: nn.Module, rank: int) -> Tensor:
    outputs: Tensor = policy(batch(9, 0, rank))
    return outputs


def test_every_stage_equals_plain_torch_through_save_load_and_export(tmp_path: Path) -> None:
    in_workers(NUM_WORKERS, check_stages, tmp_path)


def check_the_rest(rank: int, folder: Path) -> None:
    check_trap(rank)
    check_bfloat16(rank)
    check_bfloat16_sums(rank)
    check_bytes(rank, NUM_WORKERS, make_engine, NUM_BACKWARDS)
    for name, check in (("master", check_master_weights), ("average", check_average)):
        check(rank, folder / name)


def test_trap_of_two_forwards_small_steps_in_bfloat16_bytes_as_planned_and_the_average_is_what_one_computes_by_hand(
    tmp_path: Path,
) -> None:
    """In one test, as it takes long to start workers."""
    in_workers(NUM_WORKERS, check_the_rest, tmp_path)
