"""Whatever the number of workers that wrote a state, every range of it reads as it was; what is not whole is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from trainer.model.fragments import Fragments, checkpoint_weights, open_fragments
from trainer.model.shards import cut

SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (5,), "1.scale": ()}


def whole_state(kinds: Sequence[str] = ("weights", "exp_avg", "exp_avg_sq")) -> dict[str, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()} for kind in kinds}


def write(folder: Path, num_workers: int, state: dict[str, dict[str, Tensor]], num_updates: int = 3) -> list[Path]:
    files = []
    for rank in range(num_workers):
        owned = cut([math.prod(shape) for shape in SHAPES.values()], rank, num_workers)
        ranges = {name: own for name, own in zip(SHAPES, owned, strict=True) if own}
        values = {
            kind: {name: whole[name].reshape(-1)[own.start : own.stop].clone() for name, own in ranges.items()}
            for kind, whole in state.items()
        }
        files.append(folder / f"{rank}.safetensors")
        Fragments(num_updates, SHAPES, ranges, values).save(files[-1])
    return files


@given(sizes=st.lists(st.integers(0, 9), min_size=1), num_workers=st.integers(1, 7))
def test_a_cut_gives_every_number_to_one_worker_and_equally_many_to_all(sizes: list[int], num_workers: int) -> None:
    cuts = [cut(sizes, rank, num_workers) for rank in range(num_workers)]
    for index, size in enumerate(sizes):
        assert [number for ranges in cuts for number in ranges[index]] == list(range(size))
    counts = [sum(map(len, ranges)) for ranges in cuts]
    assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=40)
@given(data=st.data(), num_workers=st.integers(1, 30))  # with 21 numbers, some of 30 workers have none
def test_every_range_reads_as_it_was_written(
    data: st.DataObject, num_workers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = whole_state()
    files = write(tmp_path_factory.mktemp("state"), num_workers, state)
    with open_fragments(files) as saved:
        assert (saved.num_updates, dict(saved.shapes), saved.kinds) == (3, SHAPES, frozenset(state))
        for kind, whole in state.items():
            for name, value in whole.items():
                start = data.draw(st.integers(0, value.numel()))
                stop = data.draw(st.integers(start, value.numel()))
                assert saved.read(kind, name, range(start, stop)).equal(value.reshape(-1)[start:stop])


def test_the_whole_weights_are_the_average_if_there_is_one(tmp_path: Path) -> None:
    state = whole_state(("weights", "average"))
    for kinds in (["weights"], ["weights", "average"]):
        files = write(tmp_path, 3, {kind: state[kind] for kind in kinds})
        torch.testing.assert_close(checkpoint_weights(files), state[kinds[-1]], rtol=0, atol=0)


def test_a_missing_file_is_named_by_the_numbers_that_it_had(tmp_path: Path) -> None:
    files = write(tmp_path, 3, whole_state())
    for missing, numbers in enumerate(("0 to 6 of 0.weight", "7 to 11 of 0.weight", "2 to 2 of 0.bias")):
        rest = [file for file in files if file != files[missing]]
        with pytest.raises(ValueError, match=f"lacks numbers {numbers}: the file of a worker is missing"):
            checkpoint_weights(rest)
    with pytest.raises(ValueError, match="there is no file"):
        checkpoint_weights([])


def test_files_of_different_checkpoints_are_told_apart(tmp_path: Path) -> None:
    of_two, of_three = write(tmp_path / "2", 2, whole_state()), write(tmp_path / "3", 3, whole_state())
    with pytest.raises(ValueError, match=r"has numbers 7 to 9 of 0.weight twice"):
        checkpoint_weights([of_two[0], *of_three[1:]])
    later = write(tmp_path / "later", 2, whole_state(), num_updates=4)
    with pytest.raises(ValueError, match=r"1.safetensors and .*0.safetensors are .*different.* num_updates differ"):
        checkpoint_weights([of_two[0], later[1]])


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    files = write(tmp_path, 2, whole_state())
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"1.safetensors is damaged"):
        checkpoint_weights(files)
    save_file({"x": torch.ones(1)}, files[1])
    with pytest.raises(ValueError, match=r"1.safetensors holds no training state of format 1"):
        checkpoint_weights(files)


def test_a_state_of_another_model_or_without_an_average_is_refused_by_a_parameters_name(tmp_path: Path) -> None:
    with open_fragments(write(tmp_path, 2, whole_state())) as state:
        state.require(SHAPES, has_average=False)
        with pytest.raises(ValueError, match=r"has 3×4 0.weight, the run trains 3×5"):
            state.require(SHAPES | {"0.weight": (3, 5)}, has_average=False)
        with pytest.raises(ValueError, match=r"has no 2.weight, the run trains 7"):
            state.require(SHAPES | {"2.weight": (7,)}, has_average=False)
        with pytest.raises(ValueError, match=r"has 3×4 0.weight, the run trains no"):
            state.require({name: shape for name, shape in SHAPES.items() if name != "0.weight"}, has_average=False)
        with pytest.raises(ValueError, match=r"no average of 0.weight: was it made without ema"):
            state.require(SHAPES, has_average=True)
