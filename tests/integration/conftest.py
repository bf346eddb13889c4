"""A Chromium and the app with the embedded reward for the tests of the page: both take seconds to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from reward_server.http.limits import Limits
from reward_server.models import ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from tests.browser import CHROMIUM, Open, Visit
from tests.serving import reward_app, serve_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def limits() -> Limits:
    """So low that a test reaches it."""
    return Limits(max_pixels_per_image=1100**2)


@pytest.fixture(scope="module")
def embedded() -> ClipArgs:
    return ClipArgs(kind="clip", path=str(ROOT / "deploy/tiny/reward"))


@pytest.fixture(scope="module")  # not session: its event loop is the main thread's, where other tests want their own
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(embedded: ClipArgs, limits: Limits) -> Iterator[str]:
    with serve_app(reward_app(Worker({"fluent-clip": embedded}, WorkerArgs()), limits)) as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """visit(url, **what the context is like); every visit is checked when the test ends."""
    visits = []

    def open_page(url: str, width: int = 1280, height: int = 860, **context: str) -> Visit:
        page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(20_000)
        visits.append(Visit(page, url))
        return visits[-1]

    yield open_page
    for each in visits:
        each.page.context.close()
        each.check()


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the pictures that the aligned model drew."""
    path = tmp_path_factory.mktemp("pictures") / "face.png"
    with Image.open(ROOT / "deploy/runs/results/before_after.png") as grid:
        grid.convert("RGB").crop((130, 0, 254, 126)).save(path)
    return path
