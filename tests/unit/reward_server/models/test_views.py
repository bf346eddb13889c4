"""Crops at native resolution: where they lie, that they average, and that they see what a downscale hides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reward_server.models import ClipArgs, Hpsv2Args
from reward_server.models.clip import ClipReward
from reward_server.models.hpsv2 import Hpsv2Reward
from reward_server.models.views import native_crops
from tests.pictures import photo, tensor_of
from tests.tiny_models import make_tiny_clip, make_tiny_hpsv2

SIZE_PX = 32  # what the tiny CLIP sees


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"), image_size_px=SIZE_PX)


def load(folder: Path, crops: int) -> ClipReward:
    return ClipReward(ClipArgs(kind="clip", path=str(folder), crops=crops))


def coordinates(height: int, width: int) -> Tensor:
    """An image whose first two channels say where a pixel is."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows])[None].float()


@settings(max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 9))
def test_crops_are_windows_of_the_image_spread_from_edge_to_edge(height: int, width: int, num_crops: int) -> None:
    crops = native_crops(coordinates(height, width), num_crops, (SIZE_PX, SIZE_PX))
    if max(height, width) <= SIZE_PX:
        assert crops == []
        return
    assert len(crops) == num_crops
    window = min(SIZE_PX, height), min(SIZE_PX, width)
    starts = [(int(crop[0, 0, 0, 0]), int(crop[0, 1, 0, 0])) for crop in crops]
    for crop, (top, left) in zip(crops, starts, strict=True):
        assert torch.equal(crop, coordinates(height, width)[..., top : top + window[0], left : left + window[1]])
        assert crop.shape[-2:] == window
    for axis, free in enumerate((height - window[0], width - window[1])):
        places = [start[axis] for start in starts]
        assert min(places) + max(places) in (free - 1, free, free + 1)  # the middle is the image's


def test_the_reward_is_the_mean_over_the_views(folder: Path) -> None:
    images = tensor_of(photo(70, 50))
    plain, cropping = load(folder, 0), load(folder, 4)
    views = [images, *native_crops(images, 4, (SIZE_PX, SIZE_PX))]
    texts = plain.embed_text(["3D. cat", "Flat. cat"])
    with torch.no_grad():
        each = torch.stack([plain.embed_image(view) @ texts.T for view in views])
        torch.testing.assert_close(cropping.embed_image(images) @ texts.T, each.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert each.std() > 1e-3  # the views differ


def test_images_of_a_batch_keep_their_own_crops(folder: Path) -> None:
    images = torch.cat([tensor_of(photo(40, 60)), tensor_of(photo(40, 60)).flip(dims=[1, 3])])
    reward = load(folder, 2)
    with torch.no_grad():
        alone = torch.cat([reward.embed_image(image[None]) for image in images])
        torch.testing.assert_close(reward.embed_image(images), alone, rtol=1e-5, atol=1e-6)


def test_an_image_of_the_models_own_size_is_its_only_view(folder: Path) -> None:
    images = torch.rand(2, 3, SIZE_PX, SIZE_PX)
    with torch.no_grad():
        assert torch.equal(load(folder, 3).embed_image(images), load(folder, 0).embed_image(images))


def test_crops_see_texture_that_a_downscale_hides(folder: Path) -> None:
    """Stripes of one pixel vanish at a quarter of the size; at native resolution they are plain to see."""
    smooth = torch.full((1, 3, 4 * SIZE_PX, 4 * SIZE_PX), 0.5)
    stripes = smooth.clone()
    stripes[..., ::2], stripes[..., 1::2] = 0.3, 0.7
    with torch.no_grad():
        change_without, change_with = (
            float((reward.embed_image(stripes) - reward.embed_image(smooth)).norm())
            for reward in (load(folder, 0), load(folder, 4))
        )
    assert change_with > 20 * change_without


def test_the_gradient_of_a_crop_reaches_its_pixels(tmp_path: Path) -> None:
    architecture, checkpoint = make_tiny_hpsv2(tmp_path)
    args = Hpsv2Args(kind="hpsv2", path=str(checkpoint), architecture=architecture, crops=2)
    images = tensor_of(photo(60, 80, contrast=0.6)).requires_grad_()
    Hpsv2Reward(args).embed_image(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99
