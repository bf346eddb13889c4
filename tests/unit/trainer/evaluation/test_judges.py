"""Judges' numbers agree with closed forms, and judges recognize the real pictures of their reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_judges import make_tiny_judges
from trainer.evaluation.judges import Judges, is_among_nearest
from trainer.evaluation.measurements import Measurer

STYLES = ("3D", "Flat")
SUBJECTS = tuple(f"subject {index}" for index in range(8))


def painted() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(len(SUBJECTS), 3, 16, 16, generator=generator) * 256).to(torch.uint8)


def test_only_the_right_ones_among_the_nearest_count() -> None:
    references = torch.eye(6)
    embeddings = torch.tensor([[1.0, 0.9, 0.8, 0, 0, 0], [0, 0, 0, 3.0, 2.0, 1.0]])
    assert is_among_nearest(embeddings, references, torch.tensor([2, 3]), num_nearest=1).tolist() == [0, 1]
    assert is_among_nearest(embeddings, references, torch.tensor([2, 3]), num_nearest=3).tolist() == [1, 1]
    assert is_among_nearest(embeddings, references, torch.tensor([5, 0]), num_nearest=3).tolist() == [0, 0]


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    """Judges whose real pictures are those of `painted`."""
    return make_tiny_judges(tmp_path, STYLES, SUBJECTS, painted())


def judged(judges: Judges, images: Tensor) -> dict[str, float]:
    measurer = Measurer({}, judges, None, num_images_per_prompt=1)
    numbers = measurer.summarize(measurer.measure(images, SUBJECTS))
    return {name: value for name, value in numbers.items() if name.startswith(("style", "frechet", "subject"))}


def test_judges_recognize_the_pictures_of_their_reference(judge_folder: Path) -> None:
    judges = Judges.load(judge_folder, torch.device("cpu"))
    numbers = judged(judges, painted())
    assert (
        set(numbers)
        == Judges.metrics(judge_folder)
        == {
            "style_share_3D",
            "style_share_Flat",
            "frechet_3D",
            "frechet_Flat",
            "subject_top5",
        }
    )
    assert numbers["style_share_3D"] + numbers["style_share_Flat"] == 1
    assert numbers["frechet_3D"] == pytest.approx(0, abs=1e-5)
    assert numbers["frechet_Flat"] == pytest.approx(12, rel=1e-4)
    assert numbers["subject_top5"] == 1


def test_a_class_without_real_pictures_has_a_share_and_no_distance(tmp_path: Path) -> None:
    folder = make_tiny_judges(tmp_path, (*STYLES, "Spoiled"), SUBJECTS, painted())
    reference = load_file(folder / "reference.safetensors")
    for name in ("style.Spoiled.mean", "style.Spoiled.covariance"):
        del reference[name]
    save_file(reference, folder / "reference.safetensors", metadata={"subjects": json.dumps(SUBJECTS)})
    numbers = judged(Judges.load(folder, torch.device("cpu")), painted())
    assert set(numbers) == Judges.metrics(folder)
    assert "style_share_Spoiled" in numbers
    assert "frechet_Spoiled" not in numbers


def test_an_image_of_another_size_is_resized(judge_folder: Path) -> None:
    judges = Judges.load(judge_folder, torch.device("cpu"))
    larger = painted().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    same, resized = (judged(judges, images) for images in (painted(), larger))
    assert resized["frechet_3D"] == pytest.approx(same["frechet_3D"], abs=3)


def test_a_part_of_the_images_is_judged_among_the_prompts_of_all(judge_folder: Path) -> None:
    judges = Judges.load(judge_folder, torch.device("cpu"))
    images, told = painted(), [*SUBJECTS[1:], SUBJECTS[0]]  # none shows what it was told
    whole, _ = judges.judge(images, told, batch=3)
    assert 0 < whole["subject_top5"].sum() < len(images)
    parts = [judges.judge(images[rows], told[rows], 3, told)[0]["subject_top5"] for rows in (slice(2), slice(2, None))]
    assert torch.cat(parts).equal(whole["subject_top5"])


def test_wrong_judges_and_unknown_subjects_are_named(judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="judge_path"):
        Judges.load(tmp_path / "nowhere", torch.device("cpu"))
    with pytest.raises(ValueError, match="'a stranger'"):
        Judges.load(judge_folder, torch.device("cpu")).judge(painted()[:2], ["a stranger", SUBJECTS[0]], batch=2)
