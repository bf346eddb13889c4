"""A blind viewing: the page hides the sides, the key knows them, and all pairs come from the seed."""

from __future__ import annotations

import re

import pytest
import torch

from trainer.evaluation.viewing import Pair, choose_rows, render_viewing


def make_pairs(num: int = 12, *, has_real: bool = True) -> list[Pair]:
    def image(level: int) -> torch.Tensor:
        return torch.full((3, 8, 8), level, dtype=torch.uint8)

    return [Pair(f"<cat> {n}", image(n), image(100 + n), image(200 + n) if has_real else None) for n in range(num)]


def test_the_page_shows_all_pairs_and_says_nothing_of_the_sides() -> None:
    page, key = render_viewing("tiny", make_pairs(), seed=0)
    assert page.count("data:image/png;base64,") == 3 * 12
    assert page.count("&lt;cat&gt;") == 12
    assert "closer to the real picture beside it" in page
    assert not re.search(r"\b(model|aligned|base)\b", page.replace("by two models", ""))
    assert isinstance(key["pairs"], list)
    sides = [pair["model"] for pair in key["pairs"]]
    assert set(sides) == {"left", "right"}
    assert str(key["viewing"]) in page


def test_the_same_seed_gives_the_same_page_and_another_seed_other_sides() -> None:
    assert render_viewing("tiny", make_pairs(), seed=1) == render_viewing("tiny", make_pairs(), seed=1)
    assert render_viewing("tiny", make_pairs(), seed=1)[1] != render_viewing("tiny", make_pairs(), seed=2)[1]


def test_without_real_pictures_the_prompt_decides() -> None:
    page, _ = render_viewing("tiny", make_pairs(has_real=False), seed=0)
    assert page.count("data:image/png;base64,") == 2 * 12
    assert "closer to its prompt" in page


def test_rows_are_drawn_once_each_and_too_many_are_refused() -> None:
    rows = choose_rows(20, 12, seed=0)
    assert len(set(rows)) == 12
    assert rows == choose_rows(20, 12, seed=0) != choose_rows(20, 12, seed=1)
    with pytest.raises(ValueError, match="num_viewing_pairs is 21, but there are only 20 images"):
        choose_rows(20, 21, seed=0)
