"""Judges' numbers agree with closed forms, and judges recognize the real pictures of their reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_judges import make_tiny_judges
from trainer.evaluation.judges import Judges, frechet_distance, gaussian_of, is_among_nearest

STYLES = ("3D", "Flat")
SUBJECTS = tuple(f"subject {index}" for index in range(8))


def random_gaussian(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator)
    return torch.randn(size, generator=generator), factor @ factor.T


def painted() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(len(SUBJECTS), 3, 16, 16, generator=generator) * 256).to(torch.uint8)


def test_distance_of_commuting_gaussians_has_a_closed_form() -> None:
    deviations_a, deviations_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, 0.5])
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    distance = frechet_distance(mean_a, deviations_a.square().diag(), mean_b, deviations_b.square().diag())
    closed = (mean_a - mean_b).square().sum() + (deviations_a - deviations_b).square().sum()
    assert distance == pytest.approx(float(closed))


@pytest.mark.parametrize("seed", range(3))
def test_distance_is_symmetric_and_zero_only_to_itself(seed: int) -> None:
    a, b = random_gaussian(seed), random_gaussian(seed + 10)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a))
    assert frechet_distance(*a, *a) < 1e-6 < frechet_distance(*a, *b)


def test_distance_of_few_images_in_many_dimensions_is_finite() -> None:
    few = gaussian_of(torch.randn(3, 20, generator=torch.Generator().manual_seed(0)))
    assert frechet_distance(*few, *random_gaussian(0, 20)) > 0
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two prompts"):
        gaussian_of(torch.zeros(1, 20))


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


def test_judges_recognize_the_pictures_of_their_reference(judge_folder: Path) -> None:
    judges = Judges.load(judge_folder, torch.device("cpu"))
    numbers = judges.numbers(painted(), SUBJECTS, batch=3)
    assert set(numbers) == {
        "eval/style_share_3D",
        "eval/style_share_Flat",
        "eval/frechet_3D",
        "eval/frechet_Flat",
        "eval/subject_top5",
    }
    assert numbers["eval/style_share_3D"] + numbers["eval/style_share_Flat"] == 1
    assert numbers["eval/frechet_3D"] == pytest.approx(0, abs=1e-5)
    assert numbers["eval/frechet_Flat"] == pytest.approx(12, rel=1e-4)
    assert numbers["eval/subject_top5"] == 1


def test_an_image_of_another_size_is_resized(judge_folder: Path) -> None:
    judges = Judges.load(judge_folder, torch.device("cpu"))
    larger = painted().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    same, resized = (judges.numbers(images, SUBJECTS, batch=8) for images in (painted(), larger))
    assert resized["eval/frechet_3D"] == pytest.approx(same["eval/frechet_3D"], abs=3)


def test_wrong_judges_and_unknown_subjects_are_named(judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="judge_path"):
        Judges.load(tmp_path / "nowhere", torch.device("cpu"))
    with pytest.raises(ValueError, match="'a stranger'"):
        Judges.load(judge_folder, torch.device("cpu")).numbers(painted()[:2], ["a stranger", SUBJECTS[0]], batch=2)
