"""Each objective is the reward it says, with the gradient of autograd, in both branches and for both kinds of pair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from services.config.objective import BranchName, ControlWordsConfig, ObjectiveKind, RewardConfig
from services.contract import PromptPair, RewardResponse
from tests.local_reward import LocalReward, similarity
from trainer.algorithm.reward_loss import BranchReward, Judged

PAIRS = tuple(PromptPair(prompt, "3D", "Flat") for prompt in ("fox", "red heart", "key"))
SCALE = torch.tensor([0.1, 0.25, -0.4])
KINDS: tuple[ObjectiveKind, ...] = get_args(ObjectiveKind)
BRANCHES: tuple[BranchName, ...] = get_args(BranchName)
WORDS, NOISED = RewardConfig(name="tiny"), RewardConfig(name="tiny", pair="noised_image", image_noise=0.2)


def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def image_noise() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def under(seen: Tensor, texts: list[str]) -> Tensor:
    return torch.cat([similarity(image[None], text) for image, text in zip(seen, texts, strict=True)])


def expected(kind: ObjectiveKind, branch: BranchName, bare: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The table of reward_loss.py, as formulas."""
    if branch == "invert":
        positive, negative = negative, positive
    return {
        "direct_align": bare if branch == "denoise" else -bare,
        "sgp": positive,
        "srp": positive - negative,
        "srp_guided": (1 + SCALE) * positive - negative,
    }[kind]


def assert_same_function(ours: Tensor, theirs: Tensor, seen: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    weights = torch.tensor([1.0, -2.0, 0.5])
    gradients = [torch.autograd.grad(weights @ values, seen, retain_graph=True)[0] for values in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_with_words(kind: ObjectiveKind, branch: BranchName) -> None:
    seen = images()
    judged = BranchReward(WORDS, kind, branch, SCALE).judge(seen, PAIRS, None, LocalReward())
    bare = under(seen, [pair.prompt for pair in PAIRS])
    positive = under(seen, [f"3D. {pair.prompt}" for pair in PAIRS])
    negative = under(seen, [f"Flat. {pair.prompt}" for pair in PAIRS])
    assert_same_function(judged.rewards, expected(kind, branch, bare, positive, negative), seen)
    if kind.startswith("srp"):
        torch.testing.assert_close(judged.differences, (positive - negative).detach())


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_with_a_noised_image(kind: ObjectiveKind, branch: BranchName) -> None:
    seen = images()
    reward = LocalReward(reads_text=False)
    judged = BranchReward(NOISED, kind, branch, SCALE).judge(seen, PAIRS, image_noise(), reward)
    clean, noised = (under(view, [""] * 3) for view in (seen, (seen + 0.2 * image_noise()).clamp(0, 1)))
    assert_same_function(judged.rewards, expected(kind, branch, clean, clean, noised), seen)
    torch.testing.assert_close(judged.differences, (clean - noised).detach())


def test_swapping_the_pair_at_k_0_flips_the_sign() -> None:
    seen, zeros = images(), torch.zeros(3)
    for kind in ("srp", "srp_guided"):
        there, back = (
            BranchReward(WORDS, kind, branch, zeros).judge(seen, PAIRS, None, LocalReward()).rewards
            for branch in BRANCHES
        )
        assert_same_function(there, -back, seen)


def test_a_reward_has_words_of_its_own() -> None:
    reward = WORDS.model_copy(update={"control_words": ControlWordsConfig(positive="Red", negative="Blue")})
    pairs, _ = BranchReward(reward, "srp", "invert", SCALE).ask(PAIRS)
    assert pairs == tuple(PromptPair(pair.prompt, "Blue", "Red") for pair in PAIRS)


@pytest.mark.parametrize("reward", [WORDS, NOISED])
def test_a_tint_earns_nothing_where_it_is_ignored(reward: RewardConfig) -> None:
    """The gradient is that of the reward with each channel's mean held; the value stays as it is."""
    seen, readers = images(), LocalReward(reads_text=reward is WORDS)
    whole, held = (
        BranchReward(reward.model_copy(update={"ignores_tint": ignored}), "srp", "denoise", SCALE)
        .judge(seen, PAIRS, image_noise(), readers)
        .rewards
        for ignored in (False, True)
    )
    assert torch.equal(whole, held)
    (gradient,), (wanted,) = (torch.autograd.grad(rewards.sum(), seen) for rewards in (held, whole))
    assert wanted.mean(dim=(2, 3)).abs().max() > 1e-5
    torch.testing.assert_close(gradient, wanted - wanted.mean(dim=(2, 3), keepdim=True))


def test_hinge_is_flat_beyond_the_margin_and_where_satisfied() -> None:
    rewards = torch.tensor([0.9, 0.2, 0.3], requires_grad=True)
    hinge = Judged(rewards, torch.tensor([0.0, 0.0, 0.5])).hinge(margin=0.7, satisfied_at=0.4)
    torch.testing.assert_close(hinge, torch.tensor([0.0, 0.5, 0.0]))
    hinge.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0, -1, 0]


@pytest.mark.parametrize(
    ("reward", "reads_text", "problem"),
    [(WORDS, False, "tiny reads no text: set its pair to noised_image"), (NOISED, True, "tiny reads text")],
)
def test_a_pair_that_does_not_fit_the_reward_is_refused(reward: RewardConfig, reads_text: bool, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BranchReward(reward, "srp", "denoise", SCALE).judge(images(), PAIRS, image_noise(), LocalReward(reads_text))


def test_a_gradient_is_asked_for_only_where_somebody_needs_it() -> None:
    asked = []

    def score(*question: Any) -> RewardResponse:
        asked.append(question[-1])
        return LocalReward()(*question)

    reward, leaf = BranchReward(WORDS, "srp", "denoise", SCALE), images()
    needed = reward.judge(leaf, PAIRS, None, score).rewards
    free = reward.judge(leaf.detach(), PAIRS, None, score).rewards
    assert asked == [True, False]
    assert needed.requires_grad
    assert not free.requires_grad
    assert needed.equal(free)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_reward_that_is_not_finite_is_refused(needs_gradient: bool) -> None:
    def score(*question: Any) -> RewardResponse:
        answer = LocalReward()(*question)
        return replace(answer, rewards=answer.rewards * math.nan)

    with pytest.raises(ValueError, match="non-finite"):
        BranchReward(WORDS, "srp", "denoise", SCALE).judge(images().requires_grad_(needs_gradient), PAIRS, None, score)
