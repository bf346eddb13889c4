from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from services.commands.rank_words import draw as draw_pictures
from services.commands.word_effects import TrialError
from trainer.jobs.sample import main

SIZE = ("--height-px", "32", "--width-px", "48", "--num-steps", "2")


def draw(flux_folder: Path, out: Path, *arguments: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert main([str(flux_folder), *arguments, *SIZE, "-o", str(out)]) == 0
    with PIL.Image.open(out) as picture:
        return np.asarray(picture)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(flux_folder: Path, tmp_path: Path) -> None:
    first, again, other = (
        draw(flux_folder, tmp_path / f"{name}.png", "--prompt", "red heart", "--seed", seed)
        for name, seed in (("first", "1"), ("again", "1"), ("other", "2"))
    )
    assert first.shape == (32, 48, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_a_picture_does_not_depend_on_those_beside_it(flux_folder: Path, tmp_path: Path) -> None:
    alone = draw(flux_folder, tmp_path / "alone.png", "--prompt", "red heart")
    both = draw(flux_folder, tmp_path / "both.png", "--prompt", "red heart", "--prompt", "key")
    assert both.shape == (32, 96, 3)
    assert np.abs(both[:, :48].astype(int) - alone).max() <= 1  # a batch of two may round differently
    apart = draw(flux_folder, tmp_path / "apart.png", "--prompt", "red heart", "--prompt", "key", "--batch", "1")
    assert np.abs(both.astype(int) - apart).max() <= 1


def test_a_size_that_the_model_cannot_make_is_named(
    flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["--prompt", "key", "--height-px", "33", "-o", str(tmp_path / "out.png")]
    assert main([str(flux_folder), *bad]) == 1
    assert "33" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
def test_rank_words_draws_a_picture_for_each_prompt(flux_folder: Path) -> None:
    one, other = draw_pictures(str(flux_folder), ("red heart", "key"))
    assert one.shape == other.shape
    assert one.shape[0] == 3
    assert (one != other).any()


def test_rank_words_names_a_model_that_cannot_draw() -> None:
    with pytest.raises(TrialError, match=r"absent cannot draw.*model.path"):
        draw_pictures("absent", ("red heart",))


def test_a_file_without_a_format_is_named_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nowhere/at/all", "--prompt", "key", "-o", str(tmp_path / "key")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'key'} does not say its format" in line
