"""The recipes' plans: each fits the GPU it is for, and the page has what the planner says now."""

from __future__ import annotations

from deploy.recipes import PAGE, RECIPES, renewed


def test_every_recipe_fits_its_gpu() -> None:
    assert [each.name for each in RECIPES if each.plan().fits is not True] == []


def test_the_page_is_what_the_planner_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "make recipes"
