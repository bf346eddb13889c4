"""The judges' numbers: distances of Gaussians that are known in closed form, retrieval, shards and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from tests.tiny_judges import make_tiny_judges
from trainer.algorithm.rollout import Sampling
from trainer.evaluation.drawing import Evaluation, PictureSet, to_uint8
from trainer.evaluation.grids import before_after, picture_grid
from trainer.evaluation.judges import Judges, frechet_distance, gaussian_of, is_among_nearest

STYLES = ("3D", "Flat")
SUBJECTS = tuple(f"subject {index}" for index in range(8))


def random_gaussian(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator)
    return torch.randn(size, generator=generator), factor @ factor.T


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


@pytest.mark.parametrize(("num_images", "world_size"), [(5, 2), (6, 3), (1, 4), (7, 1)])
def test_shards_are_equally_long_and_cover_all_images(num_images: int, world_size: int) -> None:
    held_out = PictureSet(("any",) * num_images, seed=0, batch=2, sampling=Sampling(1, 1.0, 3.0, 16, 16))
    shards = [held_out.shard(num_images, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in shards}) == 1
    interleaved = [index for turn in zip(*shards, strict=True) for index in turn]
    assert interleaved[:num_images] == list(range(num_images))


def test_what_the_autoencoder_lays_out_with_channels_last_can_be_saved(tmp_path: Path) -> None:
    decoded = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    Evaluation(to_uint8(decoded), {}).save(tmp_path / "base.safetensors")
    assert torch.equal(Evaluation.load(tmp_path / "base.safetensors").images, to_uint8(decoded))


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    Evaluation(painted(), {"eval/reward": 0.1}).save(tmp_path / "base.safetensors")
    loaded = Evaluation.load(tmp_path / "base.safetensors")
    assert torch.equal(loaded.images, painted())
    assert loaded.numbers == {"eval/reward": 0.1}


def test_uint8_rounds_and_clamps() -> None:
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0])).tolist() == [0, 0, 0, 1, 255, 255]


def red_at(picture: PIL.Image.Image, x: int, y: int) -> int:
    return int(np.asarray(picture)[y, x, 0])


def test_grids_show_every_image_where_it_belongs() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 64, 64) * 40
    grid = picture_grid(images, [f"a caption much longer than its picture {i}" for i in range(5)], num_columns=2)
    assert grid.size == (2 * 128, 3 * (128 + 16))
    assert [red_at(grid, i % 2 * 128 + 5, i // 2 * 144 + 5) for i in range(5)] == [0, 40, 80, 120, 160]
    pair = before_after(images[:1], images[4:], ["one"])
    assert [red_at(pair, x, 5) for x in (5, 128 + 5, 2 * 128 + 5)] == [0, 160, 255]


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    """Judges whose reference calls the pictures of `painted` real ones."""
    return make_tiny_judges(tmp_path, STYLES, SUBJECTS, painted())


def painted() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(len(SUBJECTS), 3, 16, 16, generator=generator) * 256).to(torch.uint8)


def test_judges_recognise_the_pictures_their_reference_was_made_of(judge_folder: Path) -> None:
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
