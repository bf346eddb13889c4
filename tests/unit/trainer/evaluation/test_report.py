"""The report needs no other file, shows every number and image, and escapes every text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import torch

from trainer.evaluation.bootstrap import Interval
from trainer.evaluation.report import Column, render


class Page(HTMLParser):
    """Parses a page: its tags, those that are not closed, and all its addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page() -> str:
    images = torch.arange(2, dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4) * 100
    numbers = {"reward": Interval(0.25, 0.2, 0.3), "frechet_Flat": Interval(3.0, 2.0, 4.0)}
    moved = {"reward": Interval(0.1, 0.05, 0.15), "frechet_Flat": Interval(0.5, -1.0, 2.0)}
    columns = [Column("base", images, numbers, {}), Column("<aligned>", images + 1, numbers, moved)]
    return render("a & b", "an introduction", columns, ["cat", '"><script>alert(1)</script>'])


def test_it_is_well_formed_and_needs_nothing_else() -> None:
    parsed = Page(page())
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert len(parsed.addresses) == 4
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "http" not in page()


def test_images_are_in_their_places_unchanged() -> None:
    data = [address.split(",")[1] for address in Page(page()).addresses]
    reds = [int(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text))))[0, 0, 0]) for text in data]
    assert reds == [0, 1, 100, 101]


def test_numbers_come_with_intervals_and_clear_differences_stand_out() -> None:
    text = page()
    assert text.count("0.25 [0.2, 0.3]") == 2
    assert '<small class="clear">+0.1 [+0.05, +0.15]</small>' in text
    assert "<small>+0.5 [-1, +2]</small>" in text
    assert re.search("&lt;aligned&gt;", text)
