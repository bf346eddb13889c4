"""The page at / in a real Chromium, on the real app with the embedded reward: what people see, type and read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Route, expect

from reward_server.http.limits import Limits
from reward_server.models import AestheticArgs, ClipArgs
from reward_server.scoring.worker import Worker, WorkerArgs
from services.contract import SCORE_PATH
from tests.browser import CHROMIUM, Open
from tests.serving import reward_app, serve_app
from tests.tiny_models import make_tiny_aesthetic

KEY = "a-key-of-the-test"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"),
]


def ask(url: str, picture: Path, preference_scale: float) -> dict[str, Any]:
    """The service's own answer to what `Visit.fill` types."""
    request = {
        "images": [base64.b64encode(picture.read_bytes()).decode()],
        "prompt": "grinning face",
        "positive": "3D",
        "negative": "Flat",
        "preference_scale": preference_scale,
        "with_heat_map": True,
    }
    (result,) = httpx.post(url + SCORE_PATH, json=request, timeout=60).raise_for_status().json()["results"]
    return result


def test_the_page_shows_what_the_service_answers(visit: Open, url: str, face: Path) -> None:
    here = visit(url, reduced_motion="reduce")  # bars are at their length at once
    expect(here.page.locator("#sum")).to_have_text(
        "Still missing: a picture, a prompt, the first word, and the second word."
    )
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    answer = ask(url, face, preference_scale=0.1)
    assert here.reward() == pytest.approx(answer["reward"], abs=1e-6)
    bars_end = float(here.page.locator("#bars-help").inner_text().rstrip(".").rsplit(maxsplit=1)[1])
    for bar, name in (("#positive-bar", "positive_similarity"), ("#negative-bar", "negative_similarity")):
        shown = float(here.page.locator(f"{bar} data").get_attribute("value") or "nan")
        assert shown == pytest.approx(answer[name], abs=1e-6)
        assert here.bar_share(bar) == pytest.approx(shown / bars_end, abs=0.01)
    assert "sha256:" in here.page.locator("#scorer").inner_text()
    expect(here.page.locator("#spoken")).to_contain_text("Reward ")


def test_the_heat_map_lies_where_the_gradient_is(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    heat_map = ask(url, face, preference_scale=0.1)["heat_map"]
    for mode, name in (("Strength", "values"), ("Lighter or darker", "signed")):
        here.page.get_by_label(mode).check()
        alpha = here.heat_map_alpha()
        strength = np.abs(np.frombuffer(base64.b64decode(heat_map[name]), "<f4")).reshape(alpha.shape)
        assert alpha[strength >= np.quantile(strength, 0.999)].min() == 255
        assert alpha[strength <= np.quantile(strength, 0.01)].max() < 40
    picture, map_box = here.page.locator("#picture").bounding_box(), here.page.locator("#heat").bounding_box()
    assert picture == map_box
    here.page.get_by_label("Off").check()
    expect(here.page.locator("#heat")).to_be_hidden()


def test_swapped_words_turn_the_reward_around(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.page.get_by_label("Preference scale").fill("0")
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    reward = here.reward()
    here.page.get_by_role("button", name="Swap the two words").click()
    here.wait_for_tries(2)
    assert here.reward() == pytest.approx(-reward, abs=1e-6)
    assert abs(reward) > 0.01
    expect(here.page.locator("#change")).to_contain_text("since the try before")
    expect(here.page.locator("#tries tr").first).to_contain_text("Flat")
    here.page.get_by_role("button", name="Bring back try 1").click()
    here.wait_for_tries(3)
    assert here.reward() == pytest.approx(reward, abs=1e-6)
    expect(here.page.get_by_label("More like")).to_have_value("3D")


def test_a_picture_can_be_dropped_or_pasted(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.fill()
    data = base64.b64encode(face.read_bytes()).decode()
    for count, event in enumerate(
        ("DragEvent('drop', {dataTransfer: data", "ClipboardEvent('paste', {clipboardData: data")
    ):
        here.page.evaluate(
            f"""text => {{
                const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], 'face.png', {{type: 'image/png'}}));
                document.body.dispatchEvent(new {event}, bubbles: true, cancelable: true}}));
            }}""",
            data,
        )
        here.wait_for_tries(count + 1)


def test_a_new_request_gives_up_the_old_one(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    held: list[Route] = []
    here.page.route(f"**{SCORE_PATH}", lambda route: held.append(route), times=1)  # the first request is never answered
    here.choose(face)
    with here.page.expect_request(f"**{SCORE_PATH}") as first:
        here.fill()
    with here.page.expect_event("requestfailed") as failed:
        here.page.get_by_label("Prompt").fill("red heart")
    assert failed.value == first.value
    here.wait_for_tries(1)
    expect(here.page.locator("#tries tr")).to_contain_text("red heart")
    expect(here.page.locator("#failure")).to_be_hidden()


def test_typing_asks_once_and_keeps_one_try_a_field(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    asked = here.asked.count(url + SCORE_PATH)
    prompt = here.page.get_by_label("Prompt")
    prompt.fill("")
    prompt.press_sequentially("red heart", delay=20)
    here.wait_for_tries(2)
    prompt.press_sequentially("s", delay=20)
    expect(here.page.locator("#tries tr").first).to_contain_text("red hearts")
    here.wait_for_tries(2)
    assert here.asked.count(url + SCORE_PATH) == asked + 2


def test_a_picture_that_is_too_large_is_refused_by_name_and_can_be_scaled(
    visit: Open, url: str, tmp_path: Path
) -> None:
    Image.new("RGB", (1200, 1200), (200, 40, 40)).save(tmp_path / "large.png")
    here = visit(url)
    here.refusals.add(422)
    here.fill()
    here.choose(tmp_path / "large.png")
    refusal = here.page.get_by_role("alert")
    expect(refusal).to_contain_text("images[0] is 1200 x 1200")
    expect(refusal).to_contain_text("Request ")
    expect(here.page.locator("#reward")).to_have_text("–")
    here.page.get_by_role("button", name="Scale down to 1024").click()
    here.wait_for_tries(1)
    expect(refusal).to_be_hidden()
    expect(here.page.locator("#picture-name")).to_contain_text("1024 × 1024")


def test_what_is_no_picture_is_never_sent(visit: Open, url: str, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture", encoding="utf-8")
    here = visit(url)
    here.fill()
    here.choose(tmp_path / "notes.png")
    expect(here.page.get_by_role("alert")).to_contain_text("notes.png cannot be read as a picture")
    assert url + SCORE_PATH not in here.asked


def test_an_empty_prompt_is_named_at_its_field_and_takes_the_number_away(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.choose(face)
    here.fill()
    here.wait_for_tries(1)
    asked = here.asked.count(url + SCORE_PATH)
    prompt = here.page.get_by_label("Prompt")
    prompt.fill("  ")
    prompt.blur()
    expect(here.page.get_by_text("Say in a few words what the picture shows.")).to_be_visible()
    expect(prompt).to_have_attribute("aria-invalid", "true")
    expect(here.page.locator("#reward")).to_have_text("–")
    expect(here.page.locator("#heat")).to_be_hidden()
    assert here.asked.count(url + SCORE_PATH) == asked


def test_a_service_that_is_gone_is_said_and_asked_again(visit: Open, url: str, face: Path) -> None:
    here = visit(url)
    here.page.route(f"**{SCORE_PATH}", lambda route: route.abort("connectionrefused"), times=1)
    here.choose(face)
    here.fill()
    expect(here.page.get_by_role("alert")).to_contain_text("does not answer")
    here.page.get_by_role("button", name="Try again").click()
    here.wait_for_tries(1)
    assert here.complaints == ["Failed to load resource: net::ERR_CONNECTION_REFUSED"]
    here.complaints.clear()


def test_the_key_is_asked_for_and_kept_in_memory_only(
    visit: Open, embedded: ClipArgs, limits: Limits, face: Path
) -> None:
    app = reward_app(Worker({"fluent-clip": embedded}, WorkerArgs()), limits, keys=(KEY,))
    with serve_app(app) as url:
        here = visit(url)
        here.refusals.add(401)
        field = here.page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("another")
        field.press("Enter")
        expect(field).to_have_value("")
        field.fill(KEY)
        field.press("Enter")
        expect(here.page.locator("#served-name")).to_contain_text("fluent-clip")
        here.choose(face)
        here.fill()
        here.wait_for_tries(1)
        assert here.page.context.storage_state() == {"cookies": [], "origins": []}
        here.page.reload()
        expect(field).to_be_focused()


def test_several_rewards_can_be_chosen_and_one_may_read_no_text(
    visit: Open, embedded: ClipArgs, limits: Limits, face: Path, tmp_path: Path
) -> None:
    backbone, head = make_tiny_aesthetic(tmp_path)
    aesthetic = AestheticArgs(kind="aesthetic", path=str(head), backbone=str(backbone))
    worker = Worker({"fluent-clip": embedded, "beauty": aesthetic}, WorkerArgs())
    with serve_app(reward_app(worker, limits)) as url:
        here = visit(url)
        here.choose(face)
        here.fill()
        here.wait_for_tries(1)
        here.page.get_by_role("combobox", name="Reward").select_option("beauty")
        here.wait_for_tries(2)
        expect(here.page.get_by_label("Prompt")).to_be_disabled()
        expect(here.page.locator("#scorer")).to_contain_text("beauty@sha256:")
        expect(here.page.locator("#change")).to_have_text("")  # the two have no common scale
        expect(here.page.locator("#bars")).to_be_hidden()
        assert here.heat_map_alpha().any()


def test_the_example_needs_no_file(visit: Open, url: str) -> None:
    here = visit(url)
    here.page.get_by_role("button", name="Draw an example").click()
    here.wait_for_tries(1)
    assert np.isfinite(here.reward())
