"""The recipe of the embedded default: stages, a training that goes on, spoiled pictures, and who sees which subject."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploy.tiny.recipe import augment
from deploy.tiny.recipe.data import Emoji, RecipeError, fetch
from deploy.tiny.recipe.fit import Settings, Step, fit
from deploy.tiny.recipe.stages import Stage, run
from deploy.tiny.recipe.subjects import choose, classifiable, prompt_sets


def writes(text: str, calls: list[str]) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        calls.append(text)
        out.mkdir()
        (out / "weights").write_text(text, encoding="utf-8")

    return make


def fails(out: Path) -> None:
    out.mkdir()
    (out / "weights").write_text("half of", encoding="utf-8")
    raise KeyboardInterrupt


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """What a clean checkout has where a stage is to write."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("released", encoding="utf-8")
    (folder / "leftover").touch()
    return folder


def weights(folder: Path) -> str:
    return (folder / "weights").read_text(encoding="utf-8")


def test_a_stage_is_made_where_its_output_was_released_and_then_no_more(released: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    for text in ("first", "second"):
        run({"model": Stage(writes(text, calls), released)}, tmp_path / "build")
    assert calls == ["first"]
    assert weights(released) == "first"
    assert not (released / "leftover").exists()
    (tmp_path / "build" / "model.done").unlink()
    run({"model": Stage(writes("anew", calls), released)}, tmp_path / "build")
    assert weights(released) == "anew"


def test_an_interrupted_stage_leaves_its_output_and_is_made_again(released: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run({"model": Stage(fails, released)}, tmp_path / "build")
    assert weights(released) == "released"
    run({"model": Stage(writes("whole", []), released)}, tmp_path / "build")
    assert weights(released) == "whole"


def test_a_stage_without_an_output_is_made_every_time(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        run({"measure": Stage(lambda _: calls.append("measured"))}, tmp_path)
    assert calls == ["measured"] * 2


def test_drawings_that_cannot_be_fetched_without_npm_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=r"emojibase-data@.* comes from npm, which is not installed"):
        fetch(tmp_path / "npm")


def regress(net: Any, _: Any, step: Step) -> Tensor:
    """Return a loss that depends on torch's and on Python's randomness."""
    inputs = torch.randn(4, 3) + step.random.random()
    return (net(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()


def train(checkpoint: Path, stop_at: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    settings = Settings(seed=1, num_steps=700, learning_rate=1e-2, ema_decay=0.9, warmup=10)

    def loss(net: Any, average: Any, step: Step) -> Tensor:
        if stop_at is not None and step.share >= stop_at / settings.num_steps:
            raise KeyboardInterrupt
        return regress(net, average, step)

    average: nn.Module = fit("line", nn.Linear(3, 1), loss, settings, checkpoint)
    return average


def test_a_training_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "line.pt", stop_at=600)
    assert (tmp_path / "line.pt").exists()
    resumed = train(tmp_path / "line.pt")
    for one, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not (tmp_path / "line.pt").exists()
    assert float(regress(resumed, None, Step(1.0, random.Random(0))).detach()) < 1e-2


def make_pictures(num: int = 64) -> Tensor:
    """White pictures with a dark box."""
    pictures = torch.ones(num, 3, 64, 64)
    pictures[:, :, 16:48, 16:48] = torch.rand(num, 3, 1, 1) * 1.5 - 1
    pictures[:, :, 24:30, 20:44] = -1
    return pictures


def test_spoiled_pictures_are_pictures_and_differ_from_what_they_were() -> None:
    torch.manual_seed(0)
    pictures = make_pictures()
    spoiled = augment.spoil(pictures)
    assert spoiled.shape == pictures.shape
    assert spoiled.abs().max() <= 1
    assert ((spoiled - pictures).abs().mean(dim=(1, 2, 3)) > 0.002).all()


def test_a_pasted_box_is_a_part_of_the_other_picture() -> None:
    torch.manual_seed(0)
    mine, others = torch.zeros(64, 3, 64, 64), torch.ones(64, 3, 64, 64)
    shares = augment.paste(mine, others, 1.0).mean(dim=(1, 2, 3))
    assert (shares > 0.05).all()
    assert (shares < 0.6).all()
    assert augment.paste(mine, others, 0.0).max() == 0


def test_no_subject_that_is_reported_was_seen_by_reward_judges_or_alignment() -> None:
    labels = tuple(f"subject {number}" for number in range(1558))
    emoji = Emoji(torch.zeros(len(labels), 4, 3, 1, 1), labels, ((),) * len(labels), torch.zeros(len(labels)).bool())
    subjects, sets = choose(emoji), prompt_sets(emoji)
    held_out = set(subjects.held_out.tolist())
    assert held_out < set(subjects.drawn.tolist())
    assert not held_out & set(classifiable(emoji, subjects).tolist())
    assert not held_out & set(subjects.aligned.tolist())
    names = [label for prompts in sets.values() for label in prompts]
    assert len(names) == len(set(names)) == len(subjects.drawn)
    assert {*sets["validation"], *sets["test"]} == {labels[row] for row in held_out}
