"""Augmentation mirrors and shifts by what is drawn for each sample, wherever the sample is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from services.config.rewards import AugmentationConfig, RewardConfig
from trainer.algorithm.image_draws import augment, draw_for_images

PLAIN = RewardConfig(name="tiny")
MOVED = RewardConfig(name="tiny", augmentation=AugmentationConfig(max_shift=0.25))
NOISED = RewardConfig(name="tiny", pair="noised_image")
SIZE = (8, 16)
SHIFT = AugmentationConfig(mirrors=False, max_shift=0.25)  # by up to 2 rows and 4 columns


def picture() -> Tensor:
    return torch.arange(3 * 8 * 16, dtype=torch.float32).view(1, 3, *SIZE)


def test_the_middle_place_changes_nothing_and_a_mirror_is_a_mirror() -> None:
    middle = torch.tensor([[0.9, 0.5, 0.5]])
    assert augment(picture(), middle, MOVED.augmentation or SHIFT).equal(picture())
    mirrored = augment(picture(), torch.tensor([[0.1, 0.5, 0.5]]), MOVED.augmentation or SHIFT)
    assert mirrored.equal(picture().flip(3))


def test_shifts_reach_both_ends_and_repeat_the_edge() -> None:
    first = augment(picture(), torch.tensor([[0.0, 0.0, 0.0]]), SHIFT)
    last = augment(picture(), torch.tensor([[0.0, 0.999, 0.999]]), SHIFT)
    assert first[..., 2:, 4:].equal(picture()[..., :-2, :-4])
    assert last[..., :-2, :-4].equal(picture()[..., 2:, 4:])
    assert first[..., 0, 4:].equal(picture()[..., 0, :-4])


def test_all_shifts_are_equally_frequent() -> None:
    places = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0))
    row = torch.zeros(1, 1, *SIZE)
    row[..., 4, 8] = 1
    seen = augment(row.expand(5000, 1, *SIZE), places, SHIFT).mean(dim=0)[0]
    assert (seen > 0).sum() == 5 * 9
    torch.testing.assert_close(seen[seen > 0], torch.full((45,), 1 / 45), atol=0.01, rtol=0)


def test_the_gradient_goes_back_to_where_the_pixel_came_from() -> None:
    image = picture().requires_grad_()
    augment(image, torch.tensor([[0.1, 0.0, 0.999]]), MOVED.augmentation or SHIFT)[0, 0, 7, 0].backward()
    assert image.grad is not None
    assert image.grad.sum() == 1
    assert image.grad[0, 0, 5].sum() == 1


def test_a_sample_has_its_own_draws_on_any_worker() -> None:
    together = draw_for_images([MOVED, NOISED], 7, 3, [(0, 0), (1, 0), (1, 1)], SIZE)
    alone = draw_for_images([MOVED, NOISED], 7, 3, [(1, 1)], SIZE)
    assert together.places is not None
    assert together.noise is not None
    assert alone.places is not None
    assert alone.noise is not None
    assert together.places[2:].equal(alone.places)
    assert together.noise[2:].equal(alone.noise)
    assert together.places.unique().numel() == 9
    for seed, step, image in ((8, 3, (1, 1)), (7, 4, (1, 1)), (7, 3, (2, 1)), (7, 3, (1, 2))):
        other = draw_for_images([MOVED], seed, step, [image], SIZE).places
        assert other is not None
        assert not other.equal(alone.places)


def test_nothing_is_drawn_that_no_reward_needs() -> None:
    plain = draw_for_images([PLAIN], 0, 0, [(0, 0)], SIZE)
    assert (plain.noise, plain.places) == (None, None)
    assert draw_for_images([MOVED], 0, 0, [(0, 0)], SIZE).noise is None
    assert draw_for_images([NOISED], 0, 0, [(0, 0)], SIZE).places is None
