"""The pages for everybody: by keyboard alone, in light and dark, on a telephone, without internet."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser import CHROMIUM, CONTRASTS, Open

MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
TEXTS_ON_PAGE = (
    "h1", ".masthead p", ".served a", "h2", "label", ".fine", ".drop-title", "#example", ".segments span", ".sum",
    ".change", "#reward", ".bar dt", ".bar data", "th", "td", "td button", "legend", ".key",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"),
]


def test_everything_can_be_done_by_keyboard(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    page, keys = here.page, here.page.keyboard

    page.on("filechooser", lambda _: None)  # the browser hands choosers over from now on, not from the key press on

    def tab_to(name: str) -> None:
        keys.press("Tab")
        expect(page.locator(f"#{name}")).to_be_focused()

    keys.press("Tab")  # API
    tab_to("file")
    assert page.locator("#drop").evaluate("label => getComputedStyle(label).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        keys.press("Space")
    chooser.value.set_files(face)
    tab_to("example")
    for name, text in (("prompt", "grinning face"), ("positive", "3D"), ("swap", ""), ("negative", "Flat")):
        tab_to(name)
        keys.type(text)
    here.wait_for_tries(1)
    reward = here.reward()
    keys.press("Shift+Tab")
    keys.press("Enter")  # swap
    here.wait_for_tries(2)
    assert here.reward() != reward
    tab_to("negative")
    tab_to("scale")
    keys.press("ArrowRight")
    here.wait_for_tries(3)
    expect(page.locator("#scale-value")).to_have_text("0.15")
    keys.press("Tab")
    expect(page.get_by_label("Strength")).to_be_focused()
    keys.press("ArrowRight")
    expect(page.locator("#legend-low")).to_have_text("darker")
    tab_to("opacity")
    keys.press("ArrowLeft")
    expect(page.locator("#opacity-value")).to_have_text("80 %")
    keys.press("Tab")  # the history, which scrolls
    keys.press("Tab")
    expect(page.get_by_role("button", name="Bring back try 3")).to_be_focused()


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(visit: Open, url: str, face: Path, color_scheme: str) -> None:
    here = visit(url, color_scheme=color_scheme, reduced_motion="reduce")
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    here.page.get_by_role("button", name="Swap the two words").click()
    here.wait_for_tries(2)
    for selector in TEXTS_ON_PAGE:
        contrast = here.page.locator(selector).evaluate_all(CONTRASTS)
        assert contrast, selector
        assert min(contrast) >= MIN_CONTRAST, selector


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_need_no_sideways_scrolling(visit: Open, url: str, face: Path, width: int) -> None:
    here = visit(url, width=width)
    overflow = "() => document.documentElement.scrollWidth - innerWidth"
    assert here.page.evaluate(overflow) <= 0
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    assert here.page.evaluate(overflow) <= 0
    here.refusals.add(422)
    here.page.get_by_label("Prompt").fill(50 * "wherenothingcanbebroken")
    expect(here.page.get_by_role("alert")).to_contain_text("tokens")
    assert here.page.evaluate(overflow) <= 0


def test_the_description_of_the_api_works_without_internet(visit: Open, url: str) -> None:
    here = visit(url)
    here.page.get_by_role("link", name="API").click()
    for summary in ("Score pictures", "Rank pictures", "Served rewards"):
        expect(here.page.get_by_text(summary, exact=True)).to_be_visible()
