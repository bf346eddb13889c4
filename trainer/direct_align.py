"""Rollout in, loss out: inject known noise, one step with gradient, recover, decode, reward (Direct-Align, SRPO).

Source: Shen et al., arXiv 2509.06942. Only one transformer call carries gradient, whatever the noise level. The
reward's gradient comes from the reward service as a picture, so that no reward model lives in the trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from services.config import ObjectiveConfig
from services.contract import Float32, PromptPair, RewardResponse
from trainer.flow import Branch, euler_step, interpolate, recover_clean
from trainer.flux import FluxModel
from trainer.rollout import Rollout

# images (batch, 3, height, width) in [0, 1], a pair and a preference_scale for each -> rewards and image gradients
Score = Callable[[Float32, tuple[PromptPair, ...], tuple[float, ...]], RewardResponse]


@dataclass(frozen=True, slots=True, eq=False)
class BranchOutcome:
    """What one branch gives: `loss` (0-d, with graph) to run backward on, `rewards` (batch,) to log."""

    loss: Tensor
    rewards: Tensor
    seconds_reward: float


def branch_loss(
    branch: Branch,
    rollout: Rollout,
    transformer: nn.Module,
    flux: FluxModel,
    score: Score,
    objective: ObjectiveConfig,
) -> BranchOutcome:
    """The branch's loss, mean over the batch of relu(margin − reward); the caller averages over branches.

    Run backward on it before the next branch's forward (ZeRO stage 3 drops gradients otherwise).
    """
    recovered = recover_anchor(branch, rollout, transformer, flux, objective.train_guidance_scale)
    images = flux.decode_image(recovered, rollout.sampling.height_px, rollout.sampling.width_px)
    pairs = rollout.pairs if branch.name == "denoise" else tuple(pair.swapped() for pair in rollout.pairs)
    started = time.perf_counter()
    response = score(images.detach().float().cpu().numpy(), pairs, tuple(branch.preference_scale.tolist()))
    seconds_reward = time.perf_counter() - started
    rewards, gradient = _tensors(response, images)
    is_open = _is_open(branch, response, objective.satisfied_at).to(images.device)
    return BranchOutcome(hinge_loss(images, rewards, gradient, objective.margin, is_open), rewards, seconds_reward)


def recover_anchor(
    branch: Branch, rollout: Rollout, transformer: nn.Module, flux: FluxModel, guidance_scale: float
) -> Tensor:
    """The clean latents after one trained step, shaped as rollout.clean: clean ∓ w·(velocity − (noise − clean))."""
    branch = branch.to(rollout.clean.device)
    size = rollout.sampling.height_px, rollout.sampling.width_px
    noisy = interpolate(rollout.clean, rollout.noise, branch.sigma_start)
    velocity = flux.predict_velocity(
        transformer, noisy, branch.sigma_start, rollout.conditioning, guidance_scale, *size
    )
    stepped = euler_step(noisy, velocity, branch.sigma_start, branch.sigma_end)
    return recover_clean(stepped, rollout.noise, branch.sigma_end)


def hinge_loss(images: Tensor, rewards: Tensor, image_gradient: Tensor, margin: float, is_open: Tensor) -> Tensor:
    """Mean of relu(margin − reward) as a 0-d tensor whose gradient flows into `images` through ∂ reward / ∂ image.

    `rewards` (batch,) and `image_gradient` (as images) were computed elsewhere and carry no graph: the surrogate
    (images · constant) has the hinge's gradient, and subtracting its own value leaves the hinge's value. Images that
    are not `is_open` (batch,) bool count as zero.
    """
    hinge = (torch.relu(margin - rewards) * is_open).mean()
    is_active = ((rewards < margin) & is_open).to(images.dtype).view(-1, 1, 1, 1)
    surrogate = -(images * image_gradient * is_active).sum() / len(images)
    return hinge + surrogate - surrogate.detach()


def _is_open(branch: Branch, response: RewardResponse, satisfied_at: float | None) -> Tensor:
    """Which images (batch,) are still to be pushed: those short of `satisfied_at` toward the run's positive words.

    The invert branch needs this more than a margin: it is rewarded for the words to avoid, so that its hinge only
    grows as the policy leaves them behind.
    """
    (positive,), (negative,) = response.positive_similarities, response.negative_similarities  # of the one reward
    difference = torch.tensor(positive - negative)
    toward_wanted = difference if branch.name == "denoise" else -difference  # the invert branch swaps the words
    return toward_wanted < (math.inf if satisfied_at is None else satisfied_at)


def _tensors(response: RewardResponse, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and image gradient on the images' device; a gradient that is missing or not finite would train noise."""
    if not isinstance(response.image_gradient, np.ndarray):
        raise ValueError(f"reward {response.scorers} answered without image_gradient: ask with with_gradient=True")
    rewards = torch.tensor(response.rewards, device=images.device)
    gradient = torch.tensor(response.image_gradient, device=images.device)
    if gradient.shape != images.shape or rewards.shape != images.shape[:1]:
        shapes = f"{tuple(rewards.shape)} and {tuple(gradient.shape)}"
        raise ValueError(f"reward {response.scorers} answered shapes {shapes} to images {tuple(images.shape)}")
    if not (torch.isfinite(rewards).all() and torch.isfinite(gradient).all()):
        raise ValueError(f"reward {response.scorers} answered non-finite numbers (request {response.request_id})")
    return rewards, gradient
