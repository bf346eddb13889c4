"""A recorded forward is the model's own, for batches of any size; one that cannot be recorded is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reward_server.models.traced import traced
from reward_server.models.weights import WeightsError

SHAPE = 3, 8, 8


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize("num_images", [1, 2, 3, 7])
def test_it_gives_the_models_numbers_for_any_batch(model: nn.Module, num_images: int) -> None:
    images, recorded = torch.rand(num_images, *SHAPE), traced(model, model, SHAPE)
    with torch.inference_mode():
        for _ in range(3):  # torch optimizes a recording while it runs
            assert torch.equal(recorded(images), model(images))


def test_it_has_the_models_weights_not_copies(model: nn.Module) -> None:
    recorded, images = traced(model, model, SHAPE), torch.rand(2, *SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
        assert torch.equal(recorded(images), model(images))


def test_a_forward_that_leaves_torch_on_its_way_is_refused(model: nn.Module) -> None:
    def with_a_number_of_python(images: Tensor) -> Tensor:
        scaled: Tensor = model(images) * float(images.sum())
        return scaled

    with pytest.raises(WeightsError, match="differs"):
        traced(model, with_a_number_of_python, SHAPE)


def test_a_forward_of_one_batch_size_is_refused(model: nn.Module) -> None:
    with pytest.raises(WeightsError, match="cannot record"):
        traced(model, lambda images: model(images).reshape(2, 5), SHAPE)


def test_a_model_of_another_size_is_named(model: nn.Module) -> None:
    with pytest.raises(WeightsError, match=r"forward of images \(3, 12, 12\)"):
        traced(model, model, (3, 12, 12))
