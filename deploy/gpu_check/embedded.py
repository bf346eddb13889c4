"""Stage: the embedded default on the device beside the CPU: rollout, loss and gradient, and the reference vectors.

Float32 must agree to 1e-4 (with TF32 off: torch rounds convolutions to it by default, and the error of that is noted
too); a bfloat16 policy must have the gradient's direction. Loss and gradient start from the CPU's rollout, so that they
show their own error alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deploy.gpu_check.float32 import tf32
from deploy.gpu_check.report import Report
from deploy.gpu_check.training import local_score, sampling_of
from deploy.reference import Reference, compare, tolerance
from deploy.settings import ROOT
from reward_server.models import ClipArgs
from reward_server.scoring.scorer import Scorer
from services.config.run import RunConfig, load_run_config
from services.contract import PromptPair
from trainer.algorithm.direct_align import branch_loss
from trainer.algorithm.image_draws import draw_for_images
from trainer.algorithm.rollout import Injection, Rollout, roll_out
from trainer.data.prompt_files import load_prompts
from trainer.flow import branches
from trainer.model.policy import Policy

RUN_FILE = ROOT / "deploy" / "runs" / "tiny_srpo.yaml"
REWARD_FOLDER = "deploy/tiny/reward"
FLOAT32_LIMIT = 1e-4
BFLOAT16_COSINE = 0.99
_NUM_PROMPTS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The loss of both branches and the whole gradient, on the CPU."""

    loss: Tensor
    gradient: Tensor


def run(device: torch.device, vectors: Sequence[Path], report: Report) -> None:
    """Compare the device with the CPU, then with the published algorithm's numbers."""
    config = load_run_config(RUN_FILE)
    on_cpu, on_device = (Demo(config, each, torch.float32) for each in (torch.device("cpu"), device))
    clean = on_cpu.roll_out().clean
    exact = on_cpu.learn(clean)
    with tf32(False):
        report.check("float32: rollout", relative(on_device.roll_out().clean, clean), at_most=FLOAT32_LIMIT)
        own = on_device.learn(clean)
        report.check("float32: loss", relative(own.loss, exact.loss), at_most=FLOAT32_LIMIT)
        report.check("float32: gradient", distance(own.gradient, exact.gradient), at_most=FLOAT32_LIMIT)
    with tf32(True):
        report.add("gradient_error_with_tf32", distance(on_device.learn(clean).gradient, exact.gradient))
    half = Demo(config, device, torch.bfloat16).learn(clean)
    report.add("bfloat16_loss_error", relative(half.loss, exact.loss))
    report.check("bfloat16: cosine of gradients", cosine(half.gradient, exact.gradient), at_least=BFLOAT16_COSINE)
    with tf32(False):
        _compare_vectors(device, vectors, report)


def _compare_vectors(device: torch.device, vectors: Sequence[Path], report: Report) -> None:
    for path in vectors:
        errors = compare(Reference.load(path, str(device)))
        report.add(f"reference {path.stem}", errors)
        for name, error in errors.items():
            report.check(f"reference {path.stem}: {name}", error, at_most=tolerance(name))
    if not vectors:
        report.add("reference", "not compared: no files of vectors were given")


class Demo:
    """The demo's model, reward and first prompts, on a device and in a dtype (the reward is float32)."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._size = config.model.height_px, config.model.width_px
        self._policy = policy = Policy.load(str(ROOT / config.model.path), dtype, device)
        self._score = local_score(Scorer({config.rewards[0].name: _reward(device)}))
        assert isinstance(config.prompts.path, Path)
        prompts = load_prompts(ROOT / config.prompts.path, config.prompts.column)[:_NUM_PROMPTS]
        self._noise = policy.draw_noise(
            [torch.Generator().manual_seed(each) for each in range(len(prompts))], *self._size
        )
        self._conditioning = policy.text.encode_prompts(prompts, config.model.max_sequence_length)
        words = config.control_words
        self._pairs = tuple(PromptPair(prompt, words.positive, words.negative) for prompt in prompts)
        self._sampling = sampling_of(policy, *self._size, config.rollout.num_steps)

    def roll_out(self) -> Rollout:
        return roll_out(self._policy, self._conditioning, self._noise, self._pairs, self._sampling)

    def learn(self, clean: Tensor) -> Computed:
        """Return loss and gradient of both branches from the images `clean`, one at a low level and one at a high."""
        config, policy = self._config, self._policy
        rollout = Rollout(self._noise, clean.to(policy.device), self._conditioning, self._pairs, self._sampling)
        images = [(index, 0) for index in range(len(self._noise))]
        draws = draw_for_images(config.rewards, config.seed, 0, images, self._size)
        levels = torch.linspace(*config.objective.level_range, len(images) + 2)[1:-1].long()
        injection = Injection(rollout, self._noise, levels, draws)
        policy.transformer.zero_grad()
        losses = []
        for branch in branches(levels, config.objective, self._sampling.shift):
            outcome = branch_loss(branch, injection, policy, self._score, config.objective, config.rewards)
            outcome.loss.backward()
            losses.append(outcome.loss.detach().cpu())
        grads = [each.grad for each in policy.transformer.parameters() if each.grad is not None]
        return Computed(torch.stack(losses), torch.cat([each.float().flatten().cpu() for each in grads]))


def _reward(device: torch.device) -> ClipArgs:
    return ClipArgs(kind="clip", path=REWARD_FOLDER, device=str(device))


def relative(ours: Tensor, exact: Tensor) -> float:
    """Return the largest error over the largest number."""
    ours = ours.to(exact.device)
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max())


def distance(ours: Tensor, exact: Tensor) -> float:
    """Return |ours − exact| / |exact| in the 2-norm."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def cosine(ours: Tensor, exact: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours.double(), exact.double(), dim=0))
