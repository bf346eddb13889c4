"""Every number of the published algorithm (tiny random weights), reproduced through the functions that training uses.

The vectors lie beside the repository, in ../shared/reference; their README defines each key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.reference import GRADIENTS, Reference, compare, main, tolerance

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "reference"
FILES = sorted(FOLDER.glob("*.safetensors"))

pytestmark = pytest.mark.skipif(not FILES, reason=f"the reference vectors are not at {FOLDER}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_is_reproduced(path: Path) -> None:
    errors = compare(Reference.load(path))
    assert {name: error for name, error in errors.items() if not error <= tolerance(name)} == {}
    assert {"rollout", "recovered", "image", "reward", "preference_scale", GRADIENTS} <= errors.keys()


def test_a_file_with_one_branch_has_half_of_the_gradient_and_is_told_apart() -> None:
    reference = Reference.load(FILES[0])
    alone = replace(reference, facts=reference.facts | {"num_branches": 1})
    errors = compare(alone)
    assert errors["recovered"] <= tolerance("recovered")
    assert errors[GRADIENTS] > 0.1


def test_what_differs_is_named_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(FILES[0])
    tensors["branch1.image"] = tensors["branch1.image"] * 1.01
    assert main([str(written(tmp_path, tensors).with_suffix(".json"))]) == 1
    over = [line.split() for line in capsys.readouterr().out.splitlines() if " over " in line]
    assert [(name, limit) for name, _, _, limit in over] == [("image", "1e-04")]
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["branch0.image", "grad.proj_out.weight"])
def test_a_number_that_is_not_finite_is_over_its_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    tensors = load_file(FILES[0])
    tensors[key] = tensors[key] * math.nan
    assert main([str(written(tmp_path, tensors))]) == 1
    over = [line.split() for line in capsys.readouterr().out.splitlines() if " over " in line]
    assert "nan" in {word for words in over for word in words}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_model(path: Path) -> None:
    tensors = load_file(path)
    del tensors["transformer.proj_out.weight"]
    save_file(tensors, path)


def no_json(path: Path) -> None:
    path.with_suffix(".json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(truncated, "SafetensorError"), (another_model, "proj_out.weight"), (no_json, "JSONDecodeError")],
)
def test_a_file_that_cannot_be_compared_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], named: str
) -> None:
    path = written(tmp_path, load_file(FILES[0]))
    spoil(path)
    assert main([str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert named in line


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A file of these tensors, otherwise the first one."""
    save_file(tensors, folder / "other.safetensors")
    (folder / "other.json").write_bytes(FILES[0].with_suffix(".json").read_bytes())
    return folder / "other.safetensors"
