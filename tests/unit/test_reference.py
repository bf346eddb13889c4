"""Every number of the published algorithm (tiny random weights), reproduced through the functions that training uses.

The vectors lie beside the repository, in ../shared/reference; their README defines each key.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deploy.reference import GRADIENTS, Reference, compare, main, tolerance

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "reference"
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
    tensors, facts = load_file(FILES[0]), json.loads(FILES[0].with_suffix(".json").read_text(encoding="utf-8"))
    tensors["branch1.image"] = tensors["branch1.image"] * 1.01
    save_file(tensors, tmp_path / "other.safetensors")
    (tmp_path / "other.json").write_text(json.dumps(facts), encoding="utf-8")
    assert main([str(tmp_path / "other.json")]) == 1
    over = [line.split() for line in capsys.readouterr().out.splitlines() if " over " in line]
    assert [(name, limit) for name, _, _, limit in over] == [("image", "1e-04")]
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent.safetensors" in capsys.readouterr().err
