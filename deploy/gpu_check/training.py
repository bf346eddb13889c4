"""Make one SRPO step as a worker makes it, with each phase measured: rollout, two branches, update.

The functions are those of training (trainer/algorithm). Only two things differ: the reward is computed in this process,
and the optimizer needs no DeepSpeed; it keeps what ZeRO keeps in bfloat16 on one GPU, so that memory compares.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deploy.gpu_check.meter import Meter
from reward_server.models import Hpsv2Args
from reward_server.scoring.scorer import Job, Scorer
from services.config.engine import OptimizerConfig
from services.config.objective import ObjectiveConfig
from services.config.rewards import RewardConfig
from services.contract import Float32, PromptPair, RewardRequest, RewardResponse, WeightedReward
from trainer.algorithm.direct_align import branch_loss
from trainer.algorithm.reward_loss import Score
from trainer.algorithm.rollout import Injection, Sampling, roll_out
from trainer.flow import branches
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

REWARD = "hpsv2.1"
PAIR = PromptPair("a fox in the snow", "3D", "Flat")
OBJECTIVE = ObjectiveConfig()
OPTIMIZER = OptimizerConfig(learning_rate=5e-6)
_NOISE_SEED = 1


class Trainer(Protocol):
    """What updates a policy: trainer/model/engine.py's Engine is one, MasterWeights another."""

    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> float: ...


class MasterWeights:
    """AdamW on float32 copies of a module's trained weights, whose gradients are summed in float32, as ZeRO does it."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, num_backwards: int, *, fused: bool) -> None:
        self._trained = [each for each in module.parameters() if each.requires_grad]
        self._masters = [each.detach().to(torch.float32, copy=True) for each in self._trained]
        self._max_norm, self._num_backwards = config.max_grad_norm, num_backwards
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=fused,
        )

    def backward(self, loss: Tensor) -> None:
        (loss / self._num_backwards).backward()
        for weight, master in zip(self._trained, self._masters, strict=True):
            if weight.grad is None:
                raise ValueError("a trained weight got no gradient")
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_norm)
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self._trained, self._masters, strict=True):
                weight.copy_(master)
        return float(norm)


def local_score(scorer: Scorer) -> Score:
    """Return what asks a reward in this process as the service would be asked."""

    def score(
        name: str, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...], with_gradient: bool
    ) -> RewardResponse:
        request = RewardRequest(images, pairs, scales, (WeightedReward(name),), with_gradient)
        (answer,) = scorer.score([Job(request, name, "gpu-check")])
        if not isinstance(answer, RewardResponse):
            raise answer
        return answer

    return score


def load_scorer(architecture: str, file: Any, device: torch.device, **settings: Any) -> Scorer:
    """Load HPS v2.1's class on the device. The model is made there: on the host it would take most of a minute."""
    args = Hpsv2Args(kind="hpsv2", path=str(file), architecture=architecture, device=str(device), **settings)
    with device:
        return Scorer({REWARD: args})


def srpo_step(
    policy: Policy, trainer: Trainer, conditioning: Conditioning, sampling: Sampling, scorer: Scorer, meter: Meter
) -> dict[str, Any]:
    """Roll out, learn from both branches, update. Return losses, rewards and the gradient's norm."""
    ask = local_score(scorer)

    def score(*request: Any) -> RewardResponse:
        meter.start("reward")
        answer = ask(*request)
        meter.start("backward")  # with the hinge, which is nothing
        return answer

    generator = torch.Generator().manual_seed(_NOISE_SEED)
    noise = policy.draw_noise([generator], sampling.height_px, sampling.width_px)
    meter.start("rollout")
    rollout = roll_out(policy, conditioning, noise, (PAIR,), sampling)
    injection = Injection(rollout, noise, torch.tensor([OBJECTIVE.num_levels // 2]))
    outcomes: dict[str, Any] = {}
    for branch in branches(injection.levels, OBJECTIVE, sampling.shift):
        meter.start("forward")
        outcome = branch_loss(branch, injection, policy, score, OBJECTIVE, (RewardConfig(name=REWARD),))
        trainer.backward(outcome.loss)
        meter.stop()
        outcomes[branch.name] = {"loss": float(outcome.loss.detach()), "reward": float(outcome.rewards.mean())}
    meter.start("update")
    outcomes["grad_norm"] = trainer.step()
    meter.stop()
    return outcomes


def sampling_of(policy: Policy, height_px: int, width_px: int, num_steps: int) -> Sampling:
    """Return the published sampling: shift 3, guidance 1."""
    return Sampling(num_steps, 1.0, policy.resolve_shift(3.0, height_px, width_px), height_px, width_px)
