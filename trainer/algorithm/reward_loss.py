"""Turn decoded images into rewards and hinge losses, whose gradient flows back into the images.

Source: Shen et al., arXiv 2509.06942, section 3.3. The reward service returns (1 + k)·R(x, positive) − R(x, negative)
and its gradient. Every objective is a request of that form:

    objective      reward of the denoise branch               request
    plain          R(x, prompt)                               the bare prompt twice, k = 1
    sgp            R(x, positive)                             the positive word twice, k = 1
    srp            R(x, positive) − R(x, negative)            the pair, k = 0
    srp_guided     (1 + k)·R(x, positive) − R(x, negative)    the pair, k

The invert branch swaps the words; plain requests k = −1 there, which is −R. A reward that reads no text uses its
value of the image as R(x, positive), and its value of the image with a little noise as R(x, negative).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.clients.remote_reward import need_gradient, rewards_of
from services.config.objective import ObjectiveKind
from services.config.rewards import BranchName, RewardConfig
from services.contract import Float32, PromptPair, RewardResponse
from trainer.algorithm.image_draws import ImageDraws, augment
from trainer.algorithm.step_metrics import clock

# a reward's name, images (batch, 3, height, width) in [0, 1], a pair and a preference_scale for each, with_gradient
Score = Callable[[str, Float32, tuple[PromptPair, ...], tuple[float, ...], bool], RewardResponse]


@dataclass(frozen=True, slots=True, eq=False)
class RewardedImages:
    """What all rewards of a run give for a batch of images, and how long the reward service took.

    hinges: Σ weight · relu(margin − reward), (batch,), with a graph to the images if these need a gradient.
    rewards: (num_rewards, batch), in the order of the run's rewards, without graph.
    """

    hinges: Tensor
    rewards: Tensor
    seconds: float


def reward_images(
    images: Tensor,
    pairs: tuple[PromptPair, ...],
    rewards: Sequence[RewardConfig],
    kind: ObjectiveKind,
    branch: BranchName,
    preference_scales: Sequence[Tensor],
    image_draws: ImageDraws,
    score: Score,
) -> RewardedImages:
    """Score images (batch, 3, height, width) in [0, 1] with every reward, under one prompt pair for each image.

    preference_scales: k (batch,) for each reward. Raises ValueError as BranchReward.score_images does.
    """
    started = clock()
    answers = [
        BranchReward(reward, kind, branch, scale).score_images(images, pairs, image_draws, score)
        for reward, scale in zip(rewards, preference_scales, strict=True)
    ]
    seconds = clock() - started
    hinges = [
        reward.weight * answer.hinge(reward.margin, reward.satisfied_at)
        for reward, answer in zip(rewards, answers, strict=True)
    ]
    values = torch.stack([answer.rewards.detach() for answer in answers])
    return RewardedImages(torch.stack(hinges).sum(dim=0), values, seconds)


@dataclass(frozen=True, slots=True, eq=False)
class BranchValues:
    """One reward's values for a batch of images in one branch, both (batch,).

    rewards: what the branch is trained on, with a graph to the images if these need a gradient.
    differences: R(x, positive) − R(x, negative), the same in both branches, without graph.
    """

    rewards: Tensor
    differences: Tensor

    def hinge(self, margin: float, satisfied_at: float | None) -> Tensor:
        """Return relu(margin − reward) for each image (batch,), and zero if its difference has reached satisfied_at.

        The invert branch needs satisfied_at more than a margin: it is rewarded for the words to avoid, so its hinge
        only grows as the policy moves away from them.
        """
        is_open = self.differences < (math.inf if satisfied_at is None else satisfied_at)
        return torch.relu(margin - self.rewards) * is_open


@dataclass(frozen=True, slots=True, eq=False)
class BranchReward:
    """One reward of the run, as one branch of an objective requests it; preference_scale k is (batch,)."""

    reward: RewardConfig
    kind: ObjectiveKind
    branch: BranchName
    preference_scale: Tensor

    def score_images(
        self, images: Tensor, pairs: tuple[PromptPair, ...], image_draws: ImageDraws, score: Score
    ) -> BranchValues:
        """Score images (batch, 3, height, width) in [0, 1] under the run's pairs, one for each image.

        Raises ValueError, naming the reward, if the response would train noise: it has no gradient although the images
        need one, it has numbers that are not finite, or RewardConfig.pair does not fit the kind of reward.
        """
        if self.reward.ignores_tint:
            images = hold_tint(images)
        if self.reward.augmentation is not None:
            if image_draws.places is None:
                raise ValueError(f"reward {self.reward.name} with an augmentation needs places: draw them for the step")
            images = augment(images, image_draws.places, self.reward.augmentation)
        if self.reward.pair == "noised_image":
            return self._compare_with_noised(images, pairs, image_draws.noise, score)
        requested, scales = self.request_for(pairs)
        response = score(self.reward.name, _array(images), requested, scales, need_gradient(images))
        if not response.negative_similarities.any():
            raise ValueError(f"reward {self.reward.name} reads no text: set its pair to noised_image")
        differences = torch.tensor(
            response.positive_similarities[0] - response.negative_similarities[0], device=images.device
        )
        return BranchValues(rewards_of(images, response), self._sign * differences)

    def request_for(self, pairs: tuple[PromptPair, ...]) -> tuple[tuple[PromptPair, ...], tuple[float, ...]]:
        """Return the pairs and preference scales to send, by the table at the top of this file."""
        if self.kind == "plain":
            return tuple(PromptPair(pair.prompt, None, None) for pair in pairs), (self._sign,) * len(pairs)
        if (words := self.reward.control_words) is not None:
            pairs = tuple(PromptPair(pair.prompt, words.positive, words.negative) for pair in pairs)
        turned = pairs if self.branch == "denoise" else tuple(pair.swapped() for pair in pairs)
        if self.kind == "sgp":
            return tuple(replace(pair, negative=pair.positive) for pair in turned), (1.0,) * len(pairs)
        return turned, (0.0,) * len(pairs) if self.kind == "srp" else tuple(self.preference_scale.tolist())

    @property
    def _sign(self) -> float:
        return 1.0 if self.branch == "denoise" else -1.0

    def _compare_with_noised(
        self, images: Tensor, pairs: tuple[PromptPair, ...], noise: Tensor | None, score: Score
    ) -> BranchValues:
        """Score the images and their noised copies with a reward that reads no text."""
        if noise is None:
            raise ValueError(f"reward {self.reward.name} with pair noised_image needs noise: draw it for the step")
        noised = (images + self.reward.image_noise * noise.to(images.device)).clamp(0, 1)
        clean_values, noised_values = (self._values_without_text(view, pairs, score) for view in (images, noised))
        differences = (clean_values - noised_values).detach()
        if self.kind == "plain":
            return BranchValues(self._sign * clean_values, differences)
        sides = clean_values, noised_values
        preferred, other = sides if self.branch == "denoise" else sides[::-1]
        if self.kind == "sgp":
            return BranchValues(preferred, differences)
        scale = 0.0 if self.kind == "srp" else self.preference_scale.to(images.device)
        return BranchValues((1 + scale) * preferred - other, differences)

    def _values_without_text(self, images: Tensor, pairs: tuple[PromptPair, ...], score: Score) -> Tensor:
        """Return R(x) of each image (batch,): such a reward answers (1 + k)·R(x), and 0 as negative similarity."""
        response = score(self.reward.name, _array(images), pairs, (0.0,) * len(pairs), need_gradient(images))
        if response.negative_similarities.any():
            raise ValueError(f"reward {self.reward.name} reads text: set its pair to words")
        return rewards_of(images, response)


def hold_tint(images: Tensor) -> Tensor:
    """Return the same images (batch, 3, height, width) with a gradient whose mean over each channel's pixels is 0.

    It is the gradient of R(images − mean + m) at m = mean: the reward's gradient with the mean color held fixed.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images - (mean - mean.detach())


def _array(images: Tensor) -> Float32:
    return images.detach().float().cpu().numpy()
