"""Shards cover all images, files and 8-bit rounding keep them, and grids show each in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from trainer.algorithm.rollout import Sampling
from trainer.evaluation.drawing import Evaluation, PictureSet, to_uint8
from trainer.evaluation.grids import picture_grid, side_by_side


@pytest.mark.parametrize(("num_images", "world_size"), [(5, 2), (6, 3), (1, 4), (7, 1)])
def test_shards_are_equally_long_and_cover_all_images(num_images: int, world_size: int) -> None:
    held_out = PictureSet(("any",) * num_images, seed=0, batch=2, sampling=Sampling(1, 1.0, 3.0, 16, 16))
    shards = [held_out.shard(num_images, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in shards}) == 1
    interleaved = [index for row in zip(*shards, strict=True) for index in row]
    assert interleaved[:num_images] == list(range(num_images))


def test_what_the_autoencoder_lays_out_with_channels_last_can_be_saved(tmp_path: Path) -> None:
    decoded = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    Evaluation(to_uint8(decoded), {}).save(tmp_path / "base.safetensors")
    assert torch.equal(Evaluation.load(tmp_path / "base.safetensors").images, to_uint8(decoded))


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Evaluation(images, {"eval/reward": 0.1}).save(tmp_path / "base.safetensors")
    loaded = Evaluation.load(tmp_path / "base.safetensors")
    assert torch.equal(loaded.images, images)
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
    row = side_by_side([images[:1], images[4:], images[2:3]], ["one"], num_columns=1)
    assert [red_at(row, x, 5) for x in (5, 128 + 5, 2 * 128 + 5, 3 * 128 + 5)] == [0, 160, 80, 255]
