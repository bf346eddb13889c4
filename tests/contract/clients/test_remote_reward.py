"""The remote reward in torch: its gradient equals that of autograd through the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reward_server.models import ClipArgs, TwoTower, load_reward
from services.clients.remote_reward import attach_gradient, remote_reward
from services.clients.reward import RewardClient
from services.contract import PromptPair, RewardRequest, WeightedReward

PAIRS = (PromptPair("cat", "3D", "Flat"), PromptPair("dog", "Photo", "Oil"))
PREFERENCE_SCALE = 0.3


@pytest.fixture(scope="module")
def client(reward_url: str) -> Iterator[RewardClient]:
    with RewardClient(reward_url, timeout_s=30, max_attempts=1) as client:
        yield client


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()


def rewards_here(clip: ClipArgs, images: Tensor) -> Tensor:
    model = load_reward(clip)
    assert isinstance(model, TwoTower)
    embeds = normalize(model.embed_image(images), dim=-1)
    positive, negative = (
        (embeds * normalize(model.embed_text(texts), dim=-1)).sum(dim=-1)
        for texts in ([pair.positive_text for pair in PAIRS], [pair.negative_text for pair in PAIRS])
    )
    return (1 + PREFERENCE_SCALE) * positive - negative


def test_one_line_gives_rewards_and_gradient_of_in_process_autograd(
    client: RewardClient, clip: ClipArgs, images: Tensor
) -> None:
    here = rewards_here(clip, images)
    there = remote_reward(images, PAIRS, client=client, reward="tiny-clip", preference_scale=PREFERENCE_SCALE)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-6)

    gradient_there, gradient_here = (
        torch.autograd.grad(torch.relu(0.7 - rewards).square().mean(), images)[0]  # a trainer's loss
        for rewards in (there, here)
    )
    torch.testing.assert_close(gradient_there, gradient_here, rtol=0, atol=1e-6)
    assert gradient_here.abs().max() > 1e-4


def test_gradcheck_of_the_served_reward(client: RewardClient, images: Tensor) -> None:
    """Compare with finite differences of the service's answers along a random direction; float32 sets the tolerance."""

    def reward(images: Tensor) -> Tensor:
        return remote_reward(images.clamp(0, 1), PAIRS, client=client, reward="tiny-clip")

    assert torch.autograd.gradcheck(reward, images, eps=3e-3, atol=1e-3, rtol=0.02, fast_mode=True)


def test_a_weighted_reward_scales_reward_and_gradient(client: RewardClient, images: Tensor) -> None:
    plain = remote_reward(images, PAIRS, client=client, reward="tiny-clip")
    doubled = remote_reward(images, PAIRS, client=client, reward=(WeightedReward("tiny-clip", 2.0),))
    torch.testing.assert_close(doubled, 2 * plain)
    (once,), (twice,) = (torch.autograd.grad(rewards.sum(), images) for rewards in (plain, doubled))
    torch.testing.assert_close(twice, 2 * once)


def test_half_precision_images_get_a_gradient_of_their_own_dtype(client: RewardClient, images: Tensor) -> None:
    half = images.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(remote_reward(half, PAIRS, client=client, reward="tiny-clip").sum(), half)
    assert gradient.dtype == torch.bfloat16


def test_no_gradient_is_computed_where_none_is_needed(client: RewardClient, images: Tensor) -> None:
    assert not remote_reward(images.detach(), PAIRS, client=client, reward="tiny-clip").requires_grad
    with torch.no_grad():
        assert not remote_reward(images, PAIRS, client=client, reward="tiny-clip").requires_grad


def test_a_second_derivative_is_refused(client: RewardClient, images: Tensor) -> None:
    rewards = remote_reward(images, PAIRS, client=client, reward="tiny-clip")
    (gradient,) = torch.autograd.grad(rewards.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_gradient": None}, "with_gradient=True"),
        ({"rewards": np.full(2, np.nan, np.float32)}, "non-finite numbers"),
        ({"image_gradient": np.full((2, 3, 40, 30), np.inf, np.float32)}, "non-finite numbers"),
        ({"rewards": np.zeros(3, np.float32)}, "answered shapes"),
    ],
)
def test_an_answer_that_would_train_noise_is_refused(
    client: RewardClient, images: Tensor, change: dict[str, object], problem: str
) -> None:
    array = images.detach().numpy()
    response = client.score(RewardRequest(array, PAIRS, (0.0, 0.0), (WeightedReward("tiny-clip"),)))
    with pytest.raises(ValueError, match=problem):
        attach_gradient(images, replace(response, **change))  # type: ignore[arg-type]
