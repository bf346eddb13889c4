"""Draw and measure one worker's share of an evaluation: every num_workers-th chunk of each policy's pictures.

Workers exchange nothing. Each keeps its chunks on the disk that all share, so nobody waits for anybody, and whoever
goes on later, in however many workers, makes only what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from services.clients.checkpoint_store import files_of
from services.clients.reward import RewardClient
from services.config.finetune import FinetuneConfig
from services.config.run import RunConfig
from trainer.algorithm.rollout import Sampling
from trainer.data.conditioning import Encode, encoder, load_policy
from trainer.data.prompt_files import locate_prompts
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.evaluation.drawing import PictureSet
from trainer.evaluation.judges import Judges
from trainer.evaluation.kept_chunks import KeptChunks
from trainer.evaluation.measurements import Measurements, Measurer
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.similarities import measures_of
from trainer.jobs.evaluate_plan import Plan, PolicyPlan
from trainer.model.fragments import checkpoint_weights
from trainer.model.lora import whole_weights
from trainer.model.policy import Policy

FEATURES = "features"  # of a chunk's tensors; the others are values


class EvaluateError(ValueError):
    """A model or checkpoint cannot be evaluated; the text names it and the cure."""


def draw_and_measure(config: RunConfig, plan: Plan, device: torch.device, rank: int = 0, num_workers: int = 1) -> None:
    """Make the chunks of worker `rank` that are not kept yet. Raise EvaluateError, ModelError or RewardError."""
    service = config.reward_service
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts) as client:
        Share(config, plan, device, client, rank, num_workers).make()


class Share:
    """What one worker draws and measures. Model and judges are loaded when the first chunk needs them."""

    def __init__(
        self, config: RunConfig, plan: Plan, device: torch.device, client: RewardClient, rank: int, num_workers: int
    ) -> None:
        self._config, self._plan, self._device, self._client = config, plan, device, client
        self._rank, self._num_workers = rank, num_workers
        self._weights: str | None = None  # the folder of those that the policy has; None: the base model's
        self._chunks = range(rank, plan.num_chunks, num_workers)

    def make(self) -> None:
        """Make what is missing, policy by policy, and at last what the folder of real pictures wants."""
        for policy in self._plan.policies:
            kept = KeptChunks(Path(policy.measured))
            for number, chunk in enumerate(self._chunks, start=1):
                is_new = not kept.has(chunk)
                kept.get(chunk, partial(self._measured, policy, chunk))
                if is_new and self._rank == 0:
                    part = "" if self._num_workers == 1 else f" of worker 0's share, one of {self._num_workers}"
                    print(f"{policy.name}: chunk {number} of {len(self._chunks)}{part} is kept", flush=True)
        self._look_at_reference()

    def _measured(self, policy: PolicyPlan, chunk: int) -> dict[str, Tensor]:
        base = self._plan.policies[0]
        before = None
        if policy is not base:
            measured = KeptChunks(Path(base.measured)).get(chunk, partial(self._measured, base, chunk))
            before = Measurements(self._images(base, chunk), {}, measured[FEATURES])
        prompts = [self._plan.prompts[row] for row in self._plan.rows(chunk)]
        found = self._measurer.measure(self._images(policy, chunk), prompts, before, self._plan.prompts)
        values = {f"{place:03d} {name}": value for place, (name, value) in enumerate(found.values.items())}
        return {FEATURES: found.features} | values  # a file has its own order, so the place is in the name

    def _images(self, policy: PolicyPlan, chunk: int) -> Tensor:
        return KeptChunks(Path(policy.drawn)).get(chunk, partial(self._drawn, policy, chunk))["images"]

    def _drawn(self, policy: PolicyPlan, chunk: int) -> dict[str, Tensor]:
        self._load(policy.weights)
        evaluation, size = self._config.evaluation, (self._config.model.height_px, self._config.model.width_px)
        shift = self._policy.resolve_shift(self._config.rollout.shift, *size)
        sampling = Sampling(evaluation.num_steps, evaluation.guidance_scale, shift, *size)
        pictures = PictureSet(policy.prompts, self._config.seed, evaluation.batch, sampling)
        return {"images": pictures.draw_chunk(self._policy, self._encode, self._plan.rows(chunk)).cpu()}

    @torch.no_grad()
    def _load(self, weights: str | None) -> None:
        """Give the policy the weights of a folder, or the base model's again."""
        if weights == self._weights:
            return
        if weights is None:
            self._policy.restore_transformer()
        elif files_of(Path(weights)):
            load_checkpoint(self._policy, Path(weights), self._config.finetune)
        else:
            self._policy.load_transformer(Path(weights))
        self._weights = weights

    @cached_property
    def _policy(self) -> Policy:
        policy = load_policy(self._config, self._device)
        located = locate_prompts(self._config.evaluation.prompts_path, self._config.prompts.column)
        cut = describe_cut_prompts(policy.text, located, self._config.model.max_sequence_length)
        if cut and self._rank == 0:
            print(f"warning: {cut}", flush=True)
        return policy

    @cached_property
    def _encode(self) -> Encode:
        prompts = [each for policy in self._plan.policies for each in self._own(policy.prompts)]
        return encoder(self._config, self._policy, prompts)

    @cached_property
    def _measurer(self) -> Measurer:
        """Measure by all rewards that are served, judges, statistics and the folder of real pictures."""
        config, evaluation = self._config, self._config.evaluation
        rewards = measures_of(self._client, config, {f"reward_{name}": name for name in self._plan.rewards})
        judges = Judges.load(evaluation.judge_path, self._device) if evaluation.judge_path else None
        truth, repeats = truth_of(config, self._own(self._plan.prompts)), config.comparison.num_images_per_prompt
        return Measurer(rewards, judges, evaluation.reference_path, repeats, truth, evaluation.batch)

    def _own(self, prompts: Sequence[str]) -> list[str]:
        return [prompts[row] for chunk in self._chunks for row in self._plan.rows(chunk)]

    def _look_at_reference(self) -> None:
        kept = KeptChunks(Path(self._plan.reference))
        for chunk in range(self._rank, self._plan.num_reference_chunks, self._num_workers):
            kept.get(chunk, partial(self._reference_features, chunk))

    def _reference_features(self, chunk: int) -> dict[str, Tensor]:
        files = self._measurer.reference_chunks()[chunk]
        size = self._config.model.height_px, self._config.model.width_px
        return {FEATURES: self._measurer.reference_features(files, *size)}


def values_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values by metric name of the tensors of a measured chunk, in the order in which they were measured."""
    return {name.partition(" ")[2]: tensors[name] for name in sorted(tensors.keys() - {FEATURES})}


def load_checkpoint(policy: Policy, folder: Path, finetune: FinetuneConfig) -> None:
    """Load a checkpoint's weights into the transformer. Raise EvaluateError for one that the run has not made."""
    try:
        weights = checkpoint_weights(files_of(folder))
        if finetune.kind == "lora":  # the checkpoint has the adapter alone, and an earlier policy may be loaded
            policy.restore_transformer()
            weights = whole_weights(policy.transformer.state_dict() | weights, finetune)
        policy.transformer.load_state_dict(weights)
    except (ValueError, RuntimeError, KeyError) as error:
        raise EvaluateError(f"{folder} is no checkpoint of this run: {str(error).splitlines()[0]}") from error
