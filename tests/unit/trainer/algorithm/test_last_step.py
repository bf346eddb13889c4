"""ReFL and DRaFT-LV start their trained step at the right latents, with autograd's gradient through the reward."""

from __future__ import annotations

import pytest
import torch

from services.config.objective import ObjectiveKind
from services.config.rewards import RewardConfig
from services.contract import PromptPair
from tests.local_reward import LocalReward, similarity
from tests.tiny_flux import HEIGHT_PX, MAX_SEQUENCE_LENGTH, PROMPTS, WIDTH_PX
from trainer.algorithm.last_step import late_step_loss, renoise, roll_out_late
from trainer.algorithm.rollout import Rollout, Sampling, roll_out, velocity_at
from trainer.flow import interpolate, sigma_schedule
from trainer.model.policy import Policy

SIZE = HEIGHT_PX, WIDTH_PX
SAMPLING = Sampling(4, 1.0, 3.0, *SIZE)
TEXTS: dict[ObjectiveKind, list[tuple[float, str]]] = {
    "plain": [(1.0, "{}")],
    "sgp": [(1.0, "3D. {}")],
    "srp": [(1.0, "3D. {}"), (-1.0, "Flat. {}")],
}


@pytest.fixture(scope="module")
def rollout(flux: Policy) -> Rollout:
    prompts = PROMPTS[:3]
    return roll_out(
        flux,
        flux.encode_prompts(prompts, MAX_SEQUENCE_LENGTH),
        flux.draw_noise([torch.Generator().manual_seed(seed) for seed in range(3)], *SIZE),
        tuple(PromptPair(prompt, "3D", "Flat") for prompt in prompts),
        SAMPLING,
    )


def test_refl_takes_each_sample_at_its_step_of_the_rollout(flux: Policy, rollout: Rollout) -> None:
    late = roll_out_late(
        flux,
        rollout.conditioning,
        rollout.noise,
        rollout.pairs,
        SAMPLING,
        rollout_steps=torch.tensor([3, 2, 3]),
        num_forwards=3,
    )
    sigmas = sigma_schedule(4, 3.0)
    assert late.sigma.tolist() == sigmas[[3, 2, 3]].tolist()
    velocity = velocity_at(flux, late.latents, late.sigma, late.conditioning, SAMPLING)
    finished = late.latents - sigmas[3] * velocity  # from the last sigma, the rollout's own image
    torch.testing.assert_close(finished[[0, 2]], rollout.clean[[0, 2]], rtol=0, atol=1e-5)
    assert not finished[1].allclose(rollout.clean[1], atol=1e-3)


def test_refl_runs_num_forwards_forwards_and_takes_the_same_latents(flux: Policy, rollout: Rollout) -> None:
    """More forwards than needed change nothing: another worker may have a sample that needs them."""
    counts, taken = [], []
    for num_forwards in (2, 4):
        calls: list[object] = []
        hook = flux.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        start = rollout.conditioning, rollout.noise, rollout.pairs, SAMPLING
        taken.append(roll_out_late(flux, *start, torch.tensor([0, 2, 1]), num_forwards).latents)
        hook.remove()
        counts.append(len(calls))
    assert counts == [2, 4]
    assert taken[0].equal(taken[1])


def test_draft_lv_renoises_the_image_at_the_last_sigma(flux: Policy, rollout: Rollout) -> None:
    noise = flux.draw_noise([torch.Generator().manual_seed(9 + seed) for seed in range(3)], *SIZE)
    step, last = renoise(rollout, noise), sigma_schedule(4, 3.0)[3]
    assert step.sigma.tolist() == [last] * 3
    torch.testing.assert_close(step.latents, interpolate(rollout.clean, noise, last))
    assert renoise(rollout, rollout.noise).latents.equal(interpolate(rollout.clean, rollout.noise, last))


@pytest.mark.parametrize("kind", list(TEXTS))
def test_gradient_equals_autograd_through_the_reward(flux: Policy, rollout: Rollout, kind: ObjectiveKind) -> None:
    step = renoise(rollout, rollout.noise)
    velocity = velocity_at(flux, step.latents, step.sigma, step.conditioning, SAMPLING)
    images = flux.decode_image(step.latents - step.sigma.view(-1, 1, 1) * velocity, *SIZE)
    prompts = [pair.prompt for pair in rollout.pairs]
    rewards = sum(
        sign
        * torch.cat([similarity(image[None], text.format(each)) for image, each in zip(images, prompts, strict=True)])
        for sign, text in TEXTS[kind]
    )
    assert isinstance(rewards, torch.Tensor)
    config = RewardConfig(name="tiny", weight=0.5, margin=rewards.mean().item())  # the hinge cuts some and not others
    outcome = late_step_loss(step, flux, LocalReward(), kind, (config,))
    expected = 0.5 * torch.relu(config.margin - rewards).mean()
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(outcome.rewards, rewards.detach()[None])
    parameters = list(flux.transformer.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (outcome.loss, expected))
    assert max(gradient.abs().max() for gradient in theirs) > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)
