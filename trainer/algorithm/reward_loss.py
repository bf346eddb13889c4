"""Images in, hinge out: what each reward is asked for a branch, and how its gradient comes back to the images.

Source: Shen et al., arXiv 2509.06942, section 3.3. The service answers (1 + k)·R(x, positive) − R(x, negative) with its
gradient; every objective is put in those terms:

    objective      reward of the denoise branch               asked for
    direct_align   R(x, prompt)                               the bare prompt twice, k = 1
    sgp            R(x, positive)                             the positive word twice, k = 1
    srp            R(x, positive) − R(x, negative)            the pair, k = 0
    srp_guided     (1 + k)·R(x, positive) − R(x, negative)    the pair, k

The invert branch swaps the words; direct_align asks for k = −1 there, which is −R. A reward that reads no text has for
R(x, positive) its value of the image, and for R(x, negative) its value of the image under a little noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.clients.remote_reward import need_gradient, rewards_of
from services.config.objective import BranchName, ObjectiveKind, RewardConfig
from services.contract import Float32, PromptPair, RewardResponse

# a reward's name, images (batch, 3, height, width) in [0, 1], a pair and a preference_scale for each, with_gradient
Score = Callable[[str, Float32, tuple[PromptPair, ...], tuple[float, ...], bool], RewardResponse]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What one reward says of a batch, both (batch,).

    rewards: the branch's, with a graph to the images where these need a gradient. differences: by how much the wanted
    side of the pair is liked better than the other, whatever the branch, without graph.
    """

    rewards: Tensor
    differences: Tensor

    def hinge(self, margin: float, satisfied_at: float | None) -> Tensor:
        """relu(margin − reward) for each image (batch,), zero for those whose difference has reached satisfied_at.

        The invert branch needs satisfied_at more than a margin: it is rewarded for the words to avoid, so that its
        hinge only grows as the policy leaves them behind.
        """
        is_open = self.differences < (math.inf if satisfied_at is None else satisfied_at)
        return torch.relu(margin - self.rewards) * is_open


@dataclass(frozen=True, slots=True, eq=False)
class BranchReward:
    """One reward as a branch of an objective asks for it; preference_scale k is (batch,)."""

    reward: RewardConfig
    kind: ObjectiveKind
    branch: BranchName
    preference_scale: Tensor

    def judge(self, images: Tensor, pairs: tuple[PromptPair, ...], image_noise: Tensor | None, score: Score) -> Judged:
        """Rewards of images (batch, 3, height, width) in [0, 1] under the run's pairs, one each.

        Raises ValueError, naming the reward, where an answer would train noise: no gradient where the images need
        one, numbers that are not finite, or a kind of reward that RewardConfig.pair does not fit.
        """
        if self.reward.ignores_tint:
            images = hold_tint(images)
        if self.reward.pair == "noised_image":
            return self._against_noised(images, pairs, image_noise, score)
        asked, scales = self.ask(pairs)
        response = score(self.reward.name, _array(images), asked, scales, need_gradient(images))
        if not response.negative_similarities.any():
            raise ValueError(f"reward {self.reward.name} reads no text: set its pair to noised_image")
        differences = torch.tensor(
            response.positive_similarities[0] - response.negative_similarities[0], device=images.device
        )
        return Judged(rewards_of(images, response), self._sign * differences)

    def ask(self, pairs: tuple[PromptPair, ...]) -> tuple[tuple[PromptPair, ...], tuple[float, ...]]:
        """The pairs and scales of the request: the table at the top of this file."""
        if self.kind == "direct_align":
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

    def _against_noised(
        self, images: Tensor, pairs: tuple[PromptPair, ...], image_noise: Tensor | None, score: Score
    ) -> Judged:
        if image_noise is None:
            raise ValueError(f"reward {self.reward.name} with pair noised_image needs the injection's image_noise")
        noised = (images + self.reward.image_noise * image_noise.to(images.device)).clamp(0, 1)
        clean_values, noised_values = (self._image_values(view, pairs, score) for view in (images, noised))
        differences = (clean_values - noised_values).detach()
        if self.kind == "direct_align":
            return Judged(self._sign * clean_values, differences)
        sides = clean_values, noised_values
        preferred, other = sides if self.branch == "denoise" else sides[::-1]
        if self.kind == "sgp":
            return Judged(preferred, differences)
        scale = 0.0 if self.kind == "srp" else self.preference_scale.to(images.device)
        return Judged((1 + scale) * preferred - other, differences)

    def _image_values(self, images: Tensor, pairs: tuple[PromptPair, ...], score: Score) -> Tensor:
        """A reward that reads no text answers (1 + k) times its value of the image, and 0 as negative similarity."""
        response = score(self.reward.name, _array(images), pairs, (0.0,) * len(pairs), need_gradient(images))
        if response.negative_similarities.any():
            raise ValueError(f"reward {self.reward.name} reads text: set its pair to words")
        return rewards_of(images, response)


def hold_tint(images: Tensor) -> Tensor:
    """The same images (batch, 3, height, width), whose gradient has mean 0 over the pixels of each channel.

    It is the gradient of R(images − mean + m) at m = mean: of the reward with the mean colour held where it is.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images - (mean - mean.detach())


def _array(images: Tensor) -> Float32:
    return images.detach().float().cpu().numpy()
