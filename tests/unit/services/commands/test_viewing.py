"""`srpo viewing`: choices are counted by the key, and files that do not belong together are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.commands.main import main
from services.commands.viewing import wilson

RESULTS = Path(__file__).resolve().parents[4] / "deploy/runs/results"
SIDES = ["left", "right", "right", "left"]
KEY = {"viewing": "abc", "pairs": [{"prompt": f"cat {n}", "model": side} for n, side in enumerate(SIDES)]}


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def choices(closer: list[str | None], broken: dict[int, list[str]] | None = None, **changes: Any) -> dict[str, Any]:
    made = [{"pair": n, "closer": side, "broken": (broken or {}).get(n, [])} for n, side in enumerate(closer)]
    return {"viewing": "abc", "viewer": "Ann", "choices": made} | changes


def test_the_key_says_which_side_was_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = write(tmp_path / "key.json", KEY)
    ann = write(tmp_path / "ann.json", choices(["left", "right", "left", None], {1: ["right"], 2: ["left", "right"]}))
    assert main(["viewing", key, ann, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["viewer"], result["num_pairs"]) == ("Ann", 3)
    assert result["model_closer"] == pytest.approx(wilson(2, 3))
    assert result["model_broken"] == pytest.approx(wilson(2, 3))
    assert result["base_broken"] == pytest.approx(wilson(1, 3))


def test_the_same_counts_half_and_viewers_have_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = write(tmp_path / "key.json", KEY)
    ann = write(tmp_path / "ann.json", choices(["same", "same", "right", "left"]))
    bob = write(tmp_path / "bob.json", choices(["right", "left", "left", "right"], viewer="Bob"))
    assert main(["viewing", key, ann, bob]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["4", "75%"]
    assert lines[1].endswith("Ann")
    assert lines[2].split()[:2] == ["4", "0%"]
    assert lines[2].endswith("Bob")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (choices(["left"], viewing="xyz"), "is of viewing xyz, but the key is of abc"),
        (choices([None, None]), "has no choice"),
        (choices(["left"] * 5), "a choice for pair 4, but the viewing has 4 pairs"),
        (choices(["top"]), "is no choices of a viewing: choices.0.closer"),
        ({}, "viewing: Field required"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    key, wrong = write(tmp_path / "key.json", KEY), write(tmp_path / "ann.json", content)
    assert main(["viewing", key, wrong]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "ann.json" in error


def test_an_interval_covers_the_share_and_shrinks_with_pairs() -> None:
    assert wilson(7, 10) == pytest.approx((0.7, 0.397, 0.892), abs=1e-3)
    assert wilson(0, 10)[1] == 0
    assert wilson(10, 10)[2] == 1
    few, many = wilson(42, 60), wilson(420, 600)
    assert few[1] < many[1] < 0.7 < many[2] < few[2]


@pytest.mark.parametrize("viewer", ["a", "b"])
def test_the_published_table_counts_the_choices_that_lie_beside_it(
    viewer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RESULTS / "viewing"
    assert main(["viewing", str(folder / "viewing_key.json"), str(folder / f"choices_{viewer}.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shares = ("model_closer", "model_broken", "base_broken")
    cells = [f"{found[name][0]:.0%} ({found[name][1]:.0%} to {found[name][2]:.0%})" for name in shares]
    row = f"| {found['viewer']} | {' | '.join(cells)} |".replace("% to", " to").replace("%", " %")
    assert row in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    assert (
        f'"{json.loads((folder / "viewing_key.json").read_text())["viewing"]}"' in (folder / "viewing.html").read_text()
    )
