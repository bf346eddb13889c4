"""A branch's loss follows its formula with autograd's gradient, and each branch requests its own words and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.config.fields import Schedule
from services.config.objective import ObjectiveConfig
from services.config.rewards import BranchName, ControlWordsConfig, RewardConfig
from services.contract import PromptPair
from tests.local_reward import LocalReward, similarity
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.algorithm.direct_align import BranchOutcome, branch_loss, recover_anchor
from trainer.algorithm.reward_loss import reward_images
from trainer.algorithm.rollout import Injection, Sampling, roll_out
from trainer.flow import Branch, branches, schedule_at
from trainer.model.policy import Policy

SIZE = HEIGHT_PX, WIDTH_PX
TINY = RewardConfig(name="tiny")


@pytest.fixture(scope="module")
def injection(flux: Policy) -> Injection:
    prompts = PROMPTS[:3]
    rollout = roll_out(
        flux,
        conditioning=flux.encode_prompts(prompts, MAX_SEQUENCE_LENGTH),
        noise=flux.draw_noise([torch.Generator().manual_seed(seed) for seed in range(3)], *SIZE),
        pairs=tuple(PromptPair(prompt, "3D", "Flat") for prompt in prompts),
        sampling=Sampling(3, 1.0, 3.0, *SIZE),
    )
    return Injection(rollout, rollout.noise, torch.tensor([200, 500, 900]))


def branch_of(injection: Injection, name: BranchName, **objective: Any) -> tuple[Branch, ObjectiveConfig]:
    settings = ObjectiveConfig(branches=(name,), **objective)
    return branches(injection.levels, settings, injection.rollout.sampling.shift)[0], settings


def loss_of(
    policy: Policy, injection: Injection, name: BranchName, *rewards: RewardConfig, **objective: Any
) -> tuple[Branch, BranchOutcome]:
    branch, settings = branch_of(injection, name, **objective)
    return branch, branch_loss(branch, injection, policy, LocalReward(), settings, rewards)


def rewards_of(policy: Policy, injection: Injection, branch: Branch, scale: Tensor, words: list[str]) -> Tensor:
    """Return (1 + k)·positive − negative of the branch's images, computed by autograd alone."""
    recovered = recover_anchor(branch, injection, policy, ObjectiveConfig()).recovered
    images = policy.decode_image(recovered, *SIZE)
    sides = words if branch.name == "denoise" else words[::-1]
    positive, negative = (
        torch.cat(
            [
                similarity(image[None], f"{word}. {p.prompt}")
                for image, p in zip(images, injection.rollout.pairs, strict=True)
            ]
        )
        for word in sides
    )
    return (1 + scale) * positive - negative


def scale_of(branch: Branch) -> Tensor:
    return schedule_at(TINY.preference_scale(branch.name), branch.levels, 1000)


def assert_same_loss(policy: Policy, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    parameters = list(policy.transformer.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    assert max(gradient.abs().max() for gradient in gradients[1]) > 1e-6
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["denoise", "invert"])
def test_gradient_equals_autograd_through_the_reward(flux: Policy, injection: Injection, name: BranchName) -> None:
    branch, _ = branch_of(injection, name)
    rewards = rewards_of(flux, injection, branch, scale_of(branch), ["3D", "Flat"])
    margin = rewards.detach().sort().values[:2].mean().item()  # the hinge cuts one image and not the others
    _, outcome = loss_of(flux, injection, name, TINY.model_copy(update={"margin": margin}))
    assert 0 < (rewards < margin).sum() < len(rewards)
    assert_same_loss(flux, outcome.loss, torch.relu(margin - rewards).mean())
    torch.testing.assert_close(outcome.rewards, rewards.detach()[None])
    torch.testing.assert_close(outcome.preference_scales, scale_of(branch)[None])


@pytest.mark.parametrize("name", ["denoise", "invert"])
def test_around_a_bfloat16_network_all_is_float32(flux_folder: Path, injection: Injection, name: BranchName) -> None:
    """The step moves the latents by little, of which three digits would leave less."""
    policy = Policy.load(str(flux_folder), torch.bfloat16, vae_dtype=torch.float32)
    branch, settings = branch_of(injection, name)
    recovery = recover_anchor(branch, injection, policy, settings)
    clean, noise = injection.rollout.clean.double(), injection.noise.double()
    direction = 1 if name == "denoise" else -1
    weight = direction * branch.recovery_weight.double().view(-1, 1, 1)
    exact = clean - weight * (recovery.velocity.double() - (noise - clean))
    assert recovery.recovered.dtype == torch.float32
    torch.testing.assert_close(recovery.recovered.double(), exact, rtol=0, atol=1e-5)

    images = policy.decode_image(recovery.recovered.detach(), *SIZE).requires_grad_()
    reward = reward_images(
        images, injection.rollout.pairs, [TINY], "srp", name, [scale_of(branch)], injection.image_draws, LocalReward()
    )
    (gradient,) = torch.autograd.grad(reward.hinges.mean(), images)
    _, outcome = loss_of(policy, injection, name, TINY)
    assert {each.dtype for each in (images, gradient, reward.hinges, outcome.loss, outcome.rewards)} == {torch.float32}


@pytest.mark.parametrize("name", ["denoise", "invert"])
def test_discount_and_normalization_multiply_the_loss_of_each_image(
    flux: Policy, injection: Injection, name: BranchName
) -> None:
    discount = Schedule(kind="cosine", start=-0.5, end=2.0)
    branch, outcome = loss_of(flux, injection, name, TINY, discount=discount, recovery_weight="normalized")
    rewards = rewards_of(flux, injection, branch, scale_of(branch), ["3D", "Flat"])
    factor = schedule_at(discount, branch.levels, 1000)
    torch.testing.assert_close(outcome.discount, factor)
    assert_same_loss(flux, outcome.loss, (factor / branch.recovery_weight * torch.relu(0.7 - rewards)).mean())


def test_rewards_add_up_with_weights_pairs_scales_and_margins_of_their_own(flux: Policy, injection: Injection) -> None:
    other = RewardConfig(
        name="other",
        weight=0.3,
        control_words=ControlWordsConfig(positive="Red", negative="Blue"),
        preference_scale_denoise=Schedule(kind="constant", start=-0.2),
        margin=0.1,
    )
    branch, outcome = loss_of(flux, injection, "denoise", TINY, other)
    first = rewards_of(flux, injection, branch, scale_of(branch), ["3D", "Flat"])
    second = rewards_of(flux, injection, branch, torch.full((3,), -0.2), ["Red", "Blue"])
    assert_same_loss(flux, outcome.loss, (torch.relu(0.7 - first) + 0.3 * torch.relu(0.1 - second)).mean())
    torch.testing.assert_close(outcome.rewards, torch.stack([first, second]).detach())


def test_each_branch_requests_its_words_and_scales(flux: Policy, injection: Injection) -> None:
    reward, objective = LocalReward(), ObjectiveConfig()
    both = branches(injection.levels, objective, 3.0)
    for branch in both:
        branch_loss(branch, injection, flux, reward, objective, (TINY,))
    pairs = injection.rollout.pairs
    assert reward.requests[0] == ("tiny", pairs, tuple(scale_of(both[0]).tolist()))
    swapped = tuple(PromptPair(pair.prompt, "Flat", "3D") for pair in pairs)
    assert reward.requests[1] == ("tiny", swapped, tuple(scale_of(both[1]).tolist()))


@pytest.mark.parametrize(("name", "direction"), [("denoise", -1), ("invert", 1)])
def test_anchor_moves_by_w_times_the_velocity_error(
    flux: Policy, injection: Injection, name: BranchName, direction: int
) -> None:
    branch, objective = branch_of(injection, name)
    step = recover_anchor(branch, injection, flux, objective)
    clean = injection.rollout.clean
    error = step.velocity - (injection.noise - clean)
    expected = clean + direction * branch.recovery_weight.view(-1, 1, 1) * error
    torch.testing.assert_close(step.recovered, expected, rtol=0, atol=1e-5)


def test_a_fresh_noise_is_removed_again_after_the_step(flux: Policy, injection: Injection) -> None:
    fresh = flux.draw_noise([torch.Generator().manual_seed(9 + seed) for seed in range(3)], *SIZE)
    other = Injection(injection.rollout, fresh, injection.levels)
    branch, objective = branch_of(injection, "denoise")
    step = recover_anchor(branch, other, flux, objective)
    clean = injection.rollout.clean
    expected = clean - branch.recovery_weight.view(-1, 1, 1) * (step.velocity - (fresh - clean))
    torch.testing.assert_close(step.recovered, expected, rtol=0, atol=1e-5)


def test_truncated_timestep_is_the_published_one_and_off_by_default(flux: Policy, injection: Injection) -> None:
    branch, objective = branch_of(injection, "denoise")
    assert not objective.truncate_timestep
    truncated = objective.model_copy(update={"truncate_timestep": True})
    plain, cut = (recover_anchor(branch, injection, flux, settings) for settings in (objective, truncated))
    assert not plain.velocity.equal(cut.velocity)
    direct = flux.predict_velocity(
        cut.noisy,
        (branch.sigma_start * 1000).floor() / 1000,
        injection.rollout.conditioning,
        3.5,
        *SIZE,
    )
    torch.testing.assert_close(cut.velocity, direct, rtol=0, atol=1e-6)


def test_an_injection_that_does_not_fit_its_rollout_is_refused(injection: Injection) -> None:
    with pytest.raises(ValueError, match=r"levels \(2,\) do not fit images \(3, 6, 64\)"):
        Injection(injection.rollout, injection.noise, torch.tensor([1, 2]))
