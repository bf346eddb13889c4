"""A training state that any layout wrote is taken up by any other, and goes on as if it had never stopped."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.config.engine import EngineConfig, OptimizerConfig
from services.config.finetune import EmaConfig
from tests.workers import in_workers
from trainer.model.fragments import Fragments, checkpoint_weights, open_fragments

GLOBAL_BATCH = 4  # backwards of all workers
BEFORE, AFTER = 3, 3
# AdamW with the usual epsilon makes a step of a gradient that is rounding noise; this one makes it small
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, epsilon=1e-4, max_grad_norm=0.1)
EMA = EmaConfig(decay=0.75)
LAYOUTS = [
    *((num_workers, stage, "float32") for num_workers in (1, 2) for stage in (0, 1, 2, 3)),
    *((2, stage, "bfloat16") for stage in (1, 2, 3)),
]
PAIRS = [
    (before, after)
    for before, after in product(LAYOUTS, LAYOUTS)
    if before[2] == after[2] and (before[0], after[0]) != (1, 1)
]

Layout = tuple[int, int, str]
State = dict[str, dict[str, Tensor]]


def make_policy() -> nn.Module:
    """A policy of which a layer is frozen, as all but the adapter is under LoRA."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5), nn.Linear(5, 1))
    policy[2].requires_grad_(False)
    return policy


def make_engine(layout: Layout) -> Any:
    from trainer.model.engine import Engine, init_distributed

    num_workers, stage, dtype = layout
    init_distributed(use_gpu=False)
    config = EngineConfig(zero_stage=stage, num_workers=num_workers, global_batch=num_workers)  # type: ignore[arg-type]
    kind = getattr(torch, dtype)
    return Engine.create(make_policy().to(kind), OPTIMIZER, config, GLOBAL_BATCH // num_workers, kind, EMA)


def train(engine: Any, steps: range, poison: float = 1.0) -> list[float]:
    """Take steps; the first backward's loss of the last worker is multiplied by `poison`."""
    rank, num_workers, norms = dist.get_rank(), dist.get_world_size(), []
    for step in steps:
        for index in range(rank, GLOBAL_BATCH, num_workers):
            inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * step + index))
            dtype = next(engine.transformer.parameters()).dtype
            loss = engine.transformer(inputs.to(dtype)).float().square().mean()
            engine.backward(loss * poison if index == num_workers - 1 else loss)
        norms.append(engine.step())
    return norms


def saved(engine: Any, folder: Path) -> list[Path]:
    """The files of all workers' snapshots."""
    engine.snapshot().save(folder / f"{dist.get_rank()}.safetensors")
    dist.barrier()
    return sorted(folder.glob("*.safetensors"))


def whole(files: list[Path]) -> State:
    """Every number of a state, by kind and parameter, and the number of updates."""
    with open_fragments(files) as state:
        kinds = {
            kind: {
                name: state.read(kind, name, range(torch.Size(shape).numel())) for name, shape in state.shapes.items()
            }
            for kind in sorted(state.kinds)
        }
        return kinds | {"updates": {"": torch.tensor(state.num_updates)}}


@torch.no_grad()
def computed(engine: Any) -> Tensor:
    outputs: Tensor = engine.transformer(torch.ones(1, 6, dtype=next(engine.transformer.parameters()).dtype)).float()
    return outputs


def place(folder: Path, *layouts: Layout) -> Path:
    return folder / "-".join(f"{num_workers}x{stage}{dtype}" for num_workers, stage, dtype in layouts)


def start_runs(rank: int, num_workers: int, folder: Path) -> None:
    """Train, save, go on: the runs that are never interrupted."""
    for layout in [layout for layout in LAYOUTS if layout[0] == num_workers]:
        engine = make_engine(layout)
        train(engine, range(BEFORE))
        saved(engine, place(folder, layout) / "before")
        train(engine, range(BEFORE, BEFORE + AFTER))
        saved(engine, place(folder, layout) / "after")


def take_up_runs(rank: int, num_workers: int, folder: Path) -> None:
    """Take up every layout's state in others, save it at once and after the remaining steps.

    What is loaded replaces the state of the run before.
    """
    for after in [layout for layout in LAYOUTS if layout[0] == num_workers]:
        engine = make_engine(after)
        for before in [pair[0] for pair in PAIRS if pair[1] == after]:
            engine.load(sorted((place(folder, before) / "before").glob("*.safetensors")))
            saved(engine, place(folder, before, after) / "before")
            train(engine, range(BEFORE, BEFORE + AFTER))
            saved(engine, place(folder, before, after) / "after")


def in_two_workers(rank: int, folder: Path) -> None:
    start_runs(rank, 2, folder)
    take_up_runs(rank, 2, folder)
    for stage in (0, 1, 2, 3):
        check_snapshot_while_averaged(make_engine((2, stage, "float32")), folder / f"averaged{stage}")
        check_replaced_weights(make_engine((2, stage, "float32")), folder / f"replaced{stage}")
        check_other_shapes(make_engine((2, stage, "float32")), folder)
    for layout in LAYOUTS:
        if layout[0] == 2:
            check_skips(make_engine(layout), make_engine(layout), place(folder / "skips", layout))


def check_snapshot_while_averaged(engine: Any, folder: Path) -> None:
    train(engine, range(2))
    expected, before = whole(saved(engine, folder / "expected")), computed(engine)
    with engine.averaged():
        assert not computed(engine).equal(before)
        require_equal(whole(saved(engine, folder / "within")), expected)
    assert computed(engine).equal(before)


def check_replaced_weights(engine: Any, folder: Path) -> None:
    train(engine, range(2))
    files, expected = saved(engine, folder), computed(engine)
    train(engine, range(2, 4))
    weights = checkpoint_weights(files)
    with open_fragments(files) as state:
        trained = {
            name: state.read("weights", name, range(each.numel())).view(each.shape) for name, each in weights.items()
        }
    engine.replace_weights(trained.__getitem__)
    assert computed(engine).equal(expected)
    with engine.averaged():
        assert computed(engine).equal(expected), "the average is replaced too"
    with pytest.raises(ValueError, match=r"0.weight is \(6, 16\), the policy's is \(16, 6\)"):
        engine.replace_weights(lambda name: trained[name].t())


def check_other_shapes(engine: Any, folder: Path) -> None:
    """A state of another model is refused, on all workers, and changes nothing."""
    expected = computed(engine)
    shapes = {"0.weight": (2, 2)}
    other = Fragments(0, shapes, {"0.weight": range(4)}, {"weights": {"0.weight": torch.ones(4)}})
    path = folder / f"other{dist.get_rank()}.safetensors"
    other.save(path)
    with pytest.raises(ValueError, match=r"the checkpoint has (no|2×2) \d.(weight|bias), the run trains"):
        engine.load([path])
    assert computed(engine).equal(expected)


def check_skips(engine: Any, undisturbed: Any, folder: Path) -> None:
    """A gradient that is not finite on one worker changes nothing on any, before the first update and later."""
    for step, poison in enumerate((float("nan"), float("inf"))):
        state, expected = whole(saved(engine, folder / f"{step}")), computed(engine)
        norms = torch.tensor(train(engine, range(50 + step, 51 + step), poison))
        assert not norms.isfinite().any()
        assert computed(engine).equal(expected)
        require_equal(whole(saved(engine, folder / f"{step}-skipped")), state)
        assert train(engine, range(step, step + 1)) == train(undisturbed, range(step, step + 1))
        require_equal(
            whole(saved(engine, folder / f"{step}-after")), whole(saved(undisturbed, folder / f"{step}-undisturbed"))
        )


def require_equal(state: State, expected: State) -> None:
    assert {kind: set(values) for kind, values in state.items()} == {
        kind: set(values) for kind, values in expected.items()
    }
    for kind, values in expected.items():
        for name, value in values.items():
            assert state[kind][name].equal(value), (kind, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: by one worker, then by two, then what one takes up from two."""
    folder = tmp_path_factory.mktemp("runs")
    in_workers(1, start_runs, 1, folder)
    in_workers(2, in_two_workers, folder)
    in_workers(1, take_up_runs, 1, folder)
    return folder


def state_in(folder: Path) -> State:
    return whole(sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda layout: "x".join(map(str, layout)))
def test_a_state_is_taken_up_to_the_last_bit_and_goes_on_as_if_never_interrupted(
    folder: Path, before: Layout, after: Layout
) -> None:
    expected, taken_up = place(folder, before), place(folder, before, after)
    require_equal(state_in(taken_up / "before"), state_in(expected / "before"))
    start, ends = state_in(expected / "before"), (state_in(taken_up / "after"), state_in(expected / "after"))
    assert set(ends[0]) == {"average", "exp_avg", "exp_avg_sq", "updates", "weights"}
    assert int(ends[0]["updates"][""]) == BEFORE + AFTER
    assert not [name for name in ends[0]["weights"] if name.startswith("2.")], "frozen"
    for kind in ("weights", "average"):
        moved = max((ends[1][kind][name] - value).abs().max() for name, value in start[kind].items())
        assert moved > 1e-2, "the steps show"
    if before == after:
        require_equal(*ends)
    elif before[2] == "float32":
        torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
