"""Each objective gives the reward of its formula with autograd's gradient, in both branches, for both kinds of pair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from services.config.objective import ObjectiveKind
from services.config.rewards import AugmentationConfig, BranchName, ControlWordsConfig, RewardConfig
from services.contract import PromptPair, RewardResponse
from tests.local_reward import LocalReward, similarity
from trainer.algorithm.image_draws import NOTHING_DRAWN, ImageDraws, augment
from trainer.algorithm.reward_loss import BranchReward, BranchValues, reward_images

PAIRS = tuple(PromptPair(prompt, "3D", "Flat") for prompt in ("fox", "red heart", "key"))
SCALE = torch.tensor([0.1, 0.25, -0.4])
KINDS: tuple[ObjectiveKind, ...] = get_args(ObjectiveKind)
BRANCHES: tuple[BranchName, ...] = get_args(BranchName)
WORDS, NOISED = RewardConfig(name="tiny"), RewardConfig(name="tiny", pair="noised_image", image_noise=0.2)


def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def image_noise() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def similarities(images: Tensor, texts: list[str]) -> Tensor:
    return torch.cat([similarity(image[None], text) for image, text in zip(images, texts, strict=True)])


def expected(kind: ObjectiveKind, branch: BranchName, bare: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return what the table in reward_loss.py says, by its formulas."""
    if branch == "invert":
        positive, negative = negative, positive
    return {
        "plain": bare if branch == "denoise" else -bare,
        "sgp": positive,
        "srp": positive - negative,
        "srp_guided": (1 + SCALE) * positive - negative,
    }[kind]


def assert_same_function(ours: Tensor, theirs: Tensor, batch: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    weights = torch.tensor([1.0, -2.0, 0.5])
    gradients = [torch.autograd.grad(weights @ values, batch, retain_graph=True)[0] for values in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_with_words(kind: ObjectiveKind, branch: BranchName) -> None:
    batch = images()
    values = BranchReward(WORDS, kind, branch, SCALE).score_images(batch, PAIRS, NOTHING_DRAWN, LocalReward())
    bare = similarities(batch, [pair.prompt for pair in PAIRS])
    positive = similarities(batch, [f"3D. {pair.prompt}" for pair in PAIRS])
    negative = similarities(batch, [f"Flat. {pair.prompt}" for pair in PAIRS])
    assert_same_function(values.rewards, expected(kind, branch, bare, positive, negative), batch)
    if kind.startswith("srp"):
        torch.testing.assert_close(values.differences, (positive - negative).detach())


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_with_a_noised_image(kind: ObjectiveKind, branch: BranchName) -> None:
    batch = images()
    reward = LocalReward(reads_text=False)
    values = BranchReward(NOISED, kind, branch, SCALE).score_images(batch, PAIRS, ImageDraws(image_noise()), reward)
    clean, noised = (similarities(view, [""] * 3) for view in (batch, (batch + 0.2 * image_noise()).clamp(0, 1)))
    assert_same_function(values.rewards, expected(kind, branch, clean, clean, noised), batch)
    torch.testing.assert_close(values.differences, (clean - noised).detach())


def test_swapping_the_pair_at_k_0_flips_the_sign() -> None:
    batch, zeros = images(), torch.zeros(3)
    for kind in ("srp", "srp_guided"):
        there, back = (
            BranchReward(WORDS, kind, branch, zeros).score_images(batch, PAIRS, NOTHING_DRAWN, LocalReward()).rewards
            for branch in BRANCHES
        )
        assert_same_function(there, -back, batch)


def test_a_reward_has_words_of_its_own() -> None:
    reward = WORDS.model_copy(update={"control_words": ControlWordsConfig(positive="Red", negative="Blue")})
    pairs, _ = BranchReward(reward, "srp", "invert", SCALE).request_for(PAIRS)
    assert pairs == tuple(PromptPair(pair.prompt, "Blue", "Red") for pair in PAIRS)


@pytest.mark.parametrize("reward", [WORDS, NOISED])
def test_a_reward_that_ignores_tint_gives_no_gradient_for_it(reward: RewardConfig) -> None:
    """The gradient is that of the reward with each channel's mean held fixed. The value does not change."""
    batch, local = images(), LocalReward(reads_text=reward is WORDS)
    whole, held = (
        BranchReward(reward.model_copy(update={"ignores_tint": ignored}), "srp", "denoise", SCALE)
        .score_images(batch, PAIRS, ImageDraws(image_noise()), local)
        .rewards
        for ignored in (False, True)
    )
    assert torch.equal(whole, held)
    (gradient,), (whole_gradient,) = (torch.autograd.grad(rewards.sum(), batch) for rewards in (held, whole))
    assert whole_gradient.mean(dim=(2, 3)).abs().max() > 1e-5
    torch.testing.assert_close(gradient, whole_gradient - whole_gradient.mean(dim=(2, 3), keepdim=True))


def test_a_reward_with_an_augmentation_sees_changed_images_and_its_gradient_finds_back() -> None:
    batch, augmentation = images(), AugmentationConfig(max_shift=0.25)
    reward = WORDS.model_copy(update={"augmentation": augmentation})
    draws = ImageDraws(places=torch.tensor([[0.1, 0.9, 0.1], [0.9, 0.5, 0.5], [0.9, 0.0, 0.7]]))
    rewards = BranchReward(reward, "srp", "invert", SCALE).score_images(batch, PAIRS, draws, LocalReward()).rewards
    seen = augment(batch, draws.places, augmentation) if draws.places is not None else batch
    plain = BranchReward(WORDS, "srp", "invert", SCALE).score_images(seen, PAIRS, NOTHING_DRAWN, LocalReward()).rewards
    assert_same_function(rewards, plain, batch)
    with pytest.raises(ValueError, match="reward tiny with an augmentation needs places"):
        BranchReward(reward, "srp", "invert", SCALE).score_images(batch, PAIRS, NOTHING_DRAWN, LocalReward())


def test_the_hinge_is_flat_beyond_the_margin_and_once_satisfied() -> None:
    rewards = torch.tensor([0.9, 0.2, 0.3], requires_grad=True)
    hinge = BranchValues(rewards, torch.tensor([0.0, 0.0, 0.5])).hinge(margin=0.7, satisfied_at=0.4)
    torch.testing.assert_close(hinge, torch.tensor([0.0, 0.5, 0.0]))
    hinge.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0, -1, 0]


def test_several_rewards_give_their_weighted_hinges_and_their_values() -> None:
    batch, local = images(), LocalReward()
    rewards = [WORDS.model_copy(update={"margin": margin, "weight": weight}) for margin, weight in ((0.7, 1), (0.2, 3))]
    scales = [SCALE, 2 * SCALE]
    rewarded = reward_images(batch, PAIRS, rewards, "srp_guided", "denoise", scales, NOTHING_DRAWN, local)
    first, second = (
        BranchReward(reward, "srp_guided", "denoise", scale).score_images(batch, PAIRS, NOTHING_DRAWN, local)
        for reward, scale in zip(rewards, scales, strict=True)
    )
    assert torch.equal(rewarded.rewards, torch.stack([first.rewards, second.rewards]).detach())
    assert torch.equal(rewarded.hinges, first.hinge(0.7, None) + 3 * second.hinge(0.2, None))
    assert rewarded.hinges.requires_grad
    assert not rewarded.rewards.requires_grad


@pytest.mark.parametrize(
    ("reward", "reads_text", "problem"),
    [(WORDS, False, "tiny reads no text: set its pair to noised_image"), (NOISED, True, "tiny reads text")],
)
def test_a_pair_that_does_not_fit_the_reward_is_refused(reward: RewardConfig, reads_text: bool, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BranchReward(reward, "srp", "denoise", SCALE).score_images(
            images(), PAIRS, ImageDraws(image_noise()), LocalReward(reads_text)
        )


def test_a_gradient_is_requested_only_if_the_images_need_one() -> None:
    requests_gradient = []

    def score(*request: Any) -> RewardResponse:
        requests_gradient.append(request[-1])
        return LocalReward()(*request)

    reward, leaf = BranchReward(WORDS, "srp", "denoise", SCALE), images()
    needed = reward.score_images(leaf, PAIRS, NOTHING_DRAWN, score).rewards
    free = reward.score_images(leaf.detach(), PAIRS, NOTHING_DRAWN, score).rewards
    assert requests_gradient == [True, False]
    assert needed.requires_grad
    assert not free.requires_grad
    assert needed.equal(free)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_reward_that_is_not_finite_is_refused(needs_gradient: bool) -> None:
    def score(*request: Any) -> RewardResponse:
        answer = LocalReward()(*request)
        return replace(answer, rewards=answer.rewards * math.nan)

    with pytest.raises(ValueError, match="non-finite"):
        BranchReward(WORDS, "srp", "denoise", SCALE).score_images(
            images().requires_grad_(needs_gradient), PAIRS, NOTHING_DRAWN, score
        )
