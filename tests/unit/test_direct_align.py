"""The loss of a branch: its gradient is the one of autograd through the reward, its words and sigmas the branch's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from services.config import ObjectiveConfig
from services.contract import Float32, PromptPair, RewardResponse
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.direct_align import branch_loss, hinge_loss, recover_anchor
from trainer.flow import Branch, branches, interpolate
from trainer.flux import FluxModel
from trainer.rollout import Rollout, Sampling, roll_out


def reward_of(images: Tensor) -> Tensor:
    """A smooth reward around the hinge's margin, different for each image."""
    return images.mean(dim=(1, 2, 3)) + 0.1 * images.sin().std(dim=(1, 2, 3))


@dataclass
class LocalReward:
    """A reward in this process that answers as the service does, and remembers what it was asked."""

    asked: list[tuple[tuple[PromptPair, ...], tuple[float, ...]]] = field(default_factory=list)

    def __call__(self, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...]) -> RewardResponse:
        self.asked.append((pairs, scales))
        leaf = torch.tensor(images, requires_grad=True)
        rewards = reward_of(leaf)
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
        values = rewards.detach().numpy()
        return RewardResponse(values, values[None], values[None], gradient.numpy(), scorers=("local",), request_id="0")


@pytest.fixture(scope="module")
def rollout(flux: FluxModel) -> Rollout:
    prompts = PROMPTS[:3]
    return roll_out(
        flux.transformer,
        flux,
        conditioning=flux.encode_prompts(prompts, MAX_SEQUENCE_LENGTH),
        noise=flux.draw_noise([torch.Generator().manual_seed(seed) for seed in range(3)], HEIGHT_PX, WIDTH_PX),
        pairs=tuple(PromptPair(prompt, "3D", "Flat") for prompt in prompts),
        levels=torch.tensor([200, 500, 900]),
        sampling=Sampling(3, 1.0, 3.0, HEIGHT_PX, WIDTH_PX),
    )


def both_branches(rollout: Rollout, objective: ObjectiveConfig) -> tuple[Branch, Branch]:
    return branches(rollout.levels, objective, rollout.sampling.shift)


def between_rewards(flux: FluxModel, rollout: Rollout) -> ObjectiveConfig:
    """An objective whose margin lies between the rewards, so that the hinge cuts some images and not all."""
    rewards = reward_of(flux.decode_image(rollout.clean, HEIGHT_PX, WIDTH_PX))
    return ObjectiveConfig(margin=rewards.sort().values[:2].mean().item())


@pytest.mark.parametrize("which", [0, 1], ids=["denoise", "invert"])
def test_gradient_equals_autograd_through_the_reward(flux: FluxModel, rollout: Rollout, which: int) -> None:
    objective = between_rewards(flux, rollout)
    branch = both_branches(rollout, objective)[which]
    parameters = list(flux.transformer.parameters())
    outcome = branch_loss(branch, rollout, flux.transformer, flux, LocalReward(), objective)
    recovered = recover_anchor(branch, rollout, flux.transformer, flux, objective.train_guidance_scale)
    rewards = reward_of(flux.decode_image(recovered, HEIGHT_PX, WIDTH_PX))
    direct = torch.relu(objective.margin - rewards).mean()
    assert 0 < (rewards < objective.margin).sum() < len(rewards)
    torch.testing.assert_close(outcome.loss, direct)
    torch.testing.assert_close(outcome.rewards, rewards.detach())
    torch.testing.assert_close(torch.autograd.grad(outcome.loss, parameters), torch.autograd.grad(direct, parameters))


def test_each_branch_asks_for_its_words_and_scales(flux: FluxModel, rollout: Rollout) -> None:
    objective, reward = ObjectiveConfig(), LocalReward()
    denoise, invert = both_branches(rollout, objective)
    for branch in (denoise, invert):
        branch_loss(branch, rollout, flux.transformer, flux, reward, objective)
    assert reward.asked[0] == (rollout.pairs, tuple(denoise.preference_scale.tolist()))
    assert reward.asked[1][0] == tuple(PromptPair(pair.prompt, "Flat", "3D") for pair in rollout.pairs)
    assert reward.asked[1][1] == tuple(invert.preference_scale.tolist())


@pytest.mark.parametrize(("which", "direction"), [(0, -1), (1, 1)], ids=["denoise", "invert"])
def test_anchor_moves_by_w_times_the_velocity_error(
    flux: FluxModel, rollout: Rollout, which: int, direction: int
) -> None:
    branch = both_branches(rollout, ObjectiveConfig())[which]
    noisy = interpolate(rollout.clean, rollout.noise, branch.sigma_start)
    velocity = flux.predict_velocity(
        flux.transformer, noisy, branch.sigma_start, rollout.conditioning, 3.5, HEIGHT_PX, WIDTH_PX
    )
    error = velocity - (rollout.noise - rollout.clean)
    expected = rollout.clean + direction * branch.recovery_weight.view(-1, 1, 1) * error
    recovered = recover_anchor(branch, rollout, flux.transformer, flux, 3.5)
    torch.testing.assert_close(recovered, expected, rtol=0, atol=1e-5)


def test_hinge_is_flat_where_the_reward_has_passed_the_margin() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    is_open = torch.tensor([True, True])
    loss = hinge_loss(images, torch.tensor([0.9, 0.2]), torch.ones(2, 3, 4, 4), margin=0.7, is_open=is_open)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert images.grad is not None
    assert images.grad[0].eq(0).all()
    assert images.grad[1].eq(-0.5).all()


@pytest.mark.parametrize(("which", "is_pushed"), [(0, [True, False, False]), (1, [False, False, True])])
def test_neither_branch_pushes_an_image_that_is_satisfied(
    flux: FluxModel, rollout: Rollout, which: int, is_pushed: list[bool]
) -> None:
    """Differences −0.1, 0.2 and 0.4; for the invert branch, which swaps the words, they count the other way round."""
    positive, negative = np.array([0.2, 0.5, 0.9], np.float32), np.array([0.3, 0.3, 0.5], np.float32)
    objective = ObjectiveConfig(satisfied_at=0.15 if which == 0 else -0.3, margin=10.0)

    def score(images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...]) -> RewardResponse:
        return RewardResponse(
            positive - negative, positive[None], negative[None], np.ones_like(images), ("local",), "0"
        )

    branch = both_branches(rollout, objective)[which]
    outcome = branch_loss(branch, rollout, flux.transformer, flux, score, objective)
    expected = (10.0 - torch.tensor(positive - negative))[torch.tensor(is_pushed)].sum() / 3
    torch.testing.assert_close(outcome.loss.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_gradient": None}, "without image_gradient"),
        ({"rewards": np.full(3, np.nan, np.float32)}, "non-finite numbers"),
        ({"rewards": np.zeros(2, np.float32)}, "answered shapes"),
    ],
)
def test_answer_that_would_train_noise_is_refused(
    flux: FluxModel, rollout: Rollout, change: dict[str, Float32 | None], problem: str
) -> None:
    def broken(images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...]) -> RewardResponse:
        return replace(LocalReward()(images, pairs, scales), **change)  # type: ignore[arg-type]

    objective = ObjectiveConfig()
    denoise, _ = both_branches(rollout, objective)
    with pytest.raises(ValueError, match=problem):
        branch_loss(denoise, rollout, flux.transformer, flux, broken, objective)
