"""One visit to the page in a real Chromium: what a person does there, and whatever the browser complains of."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import ConsoleMessage, Page, Request, expect

expect.set_options(timeout=30_000)  # of a machine that has other things to do

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Of each element: its text's color against the nearest ground behind it (WCAG 2.2, relative luminance).
CONTRASTS = """elements => {
    const numbers = color => color.match(/[0-9.]+/g).map(Number);
    const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([red, green, blue]) =>
        0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
    const ground = element => {
        const color = numbers(getComputedStyle(element).backgroundColor);
        return color.length === 3 ? color : ground(element.parentElement);
    };
    return elements.filter(element => element.checkVisibility()).map(element => {
        const [one, other] = [numbers(getComputedStyle(element).color), ground(element)].map(luminance);
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    });
}"""


@dataclass
class Visit:
    """One visit in a fresh context. `refusals`: statuses that the test provokes; nothing else may go wrong."""

    page: Page
    url: str
    refusals: set[int] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # URLs

    def __post_init__(self) -> None:
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._see)
        self.page.goto(self.url)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _see(self, request: Request) -> None:
        self.asked.append(request.url)

    def fill(self, prompt: str = "grinning face", positive: str = "3D", negative: str = "Flat") -> None:
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_label("More like").fill(positive)
        self.page.get_by_label("than like").fill(negative)

    def choose(self, picture: Path) -> None:
        self.page.locator("#file").set_input_files(picture)

    def wait_for_tries(self, count: int) -> None:
        expect(self.page.locator("#tries tr")).to_have_count(count)
        expect(self.page.locator("#result")).to_have_attribute("data-state", "full")
        expect(self.page.locator("#result")).to_have_attribute("aria-busy", "false")

    def reward(self) -> float:
        return float(self.page.locator("#reward").get_attribute("value") or "nan")

    def bar_share(self, bar: str) -> float:
        """How much of its track a bar fills."""
        filled, track = (self.page.locator(f"{bar} {part}").bounding_box() for part in (".fill", ".track"))
        assert filled is not None
        assert track is not None
        return filled["width"] / track["width"]

    def heat_map_alpha(self) -> NDArray[np.uint8]:
        """(height_px, width_px); 0 is where nothing is drawn."""
        data_url = self.page.locator("#heat").evaluate("canvas => canvas.toDataURL('image/png')")
        with Image.open(BytesIO(base64.b64decode(data_url.partition(",")[2]))) as picture:
            return np.asarray(picture.getchannel("A"))

    def check(self) -> None:
        foreign = [url for url in self.asked if not url.startswith((f"{self.url}/", "blob:", "data:"))]
        assert not foreign, "requests left the origin"
        expected = {f"the server responded with a status of {status} " for status in self.refusals}
        assert not [each for each in self.complaints if not any(text in each for text in expected)]


Open = Callable[..., Visit]  # the fixture `visit`: an address, and what the browser is like
