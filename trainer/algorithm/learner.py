"""Define the learner, the base of every training method: roll out a step's samples, learn from them, update.

learner = make_learner(config, engine, policy, score, encode)
for materials in learner.roll_out(step):
    for material in materials:
        learner.learn(material)
    learner.update()

All randomness follows from (seed, step, sample index) alone, so a step is the same on any number of workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.clients.reward import RewardRejected
from services.config.run import RunConfig
from services.contract import PromptPair
from trainer.algorithm.image_draws import ImageDraws, draw_for_images
from trainer.algorithm.reward_loss import Score
from trainer.algorithm.rollout import Rollout, Sampling, roll_out
from trainer.algorithm.step_metrics import StepMetrics
from trainer.data.batches import Batch, open_batches
from trainer.data.conditioning import Encode
from trainer.draws import draw_words, noise_generator, shard
from trainer.model.engine import Engine
from trainer.model.policy import Policy

Material = TypeVar("Material")  # what `learn` takes: an injection, a late step, a noisy step


class StepError(ValueError):
    """Raised for a step that a repetition would not mend; the message names step, worker, prompts and cause.

    A latent or a reward's response is not finite or does not fit, or too many updates in a row were skipped.
    """


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward, by their indices in the global batch `batch` of a step."""

    step: int
    indices: tuple[int, ...]
    batch: Batch

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self.batch.prompts[index] for index in self.indices)


def worker_samples(config: RunConfig, rank: int, num_workers: int) -> range:
    """Return the sample indices that a worker takes of each step's global batch."""
    return shard(config.engine.global_batch, rank, num_workers)


class Learner(ABC, Generic[Material]):
    """Base of all learners. All workers call its methods in the same order; `metrics` collects the step's metrics."""

    def __init__(self, config: RunConfig, engine: Engine, policy: Policy, score: Score, encode: Encode) -> None:
        self.metrics = StepMetrics()
        self._step = self._num_skipped = 0
        self._config, self._engine, self._score, self._encode = config, engine, score, encode
        self._policy = policy.calling(engine.transformer)  # gradients reach the engine only through its own wrapper
        self._sampler = self._policy.computing_in(getattr(torch, config.rollout_dtype))
        self._batches = open_batches(config, policy.source)
        rollout, truncate = config.rollout, config.objective.truncate_timestep
        self._samplings = {
            size: Sampling(
                rollout.num_steps, rollout.guidance_scale, policy.resolve_shift(rollout.shift, *size), *size, truncate
            )
            for size in config.model.training_sizes
        }

    def follow(self, config: RunConfig) -> None:
        """Go on with the control words, scales and weights of `config`, otherwise the same run (steering.py)."""
        self._config = config

    def roll_out(self, step: int) -> list[list[Material]]:
        """Roll out the worker's prompts, one micro-batch at a time. Return what to learn from, grouped by update.

        A run on a dataset reads the images' latents instead and draws the noise. Raise StepError for a latent
        that is not finite.
        """
        self._step = step
        batch, size = self._batches.batch(step), self._config.engine.micro_batch
        indices = worker_samples(self._config, dist.get_rank(), dist.get_world_size())
        starts = range(0, len(indices), size)
        by_rollout = [self._prepare(MicroBatch(step, tuple(indices[start : start + size]), batch)) for start in starts]
        return [list(chain.from_iterable(groups)) for groups in zip(*by_rollout, strict=True)]

    @abstractmethod
    def learn(self, material: Material) -> None:
        """Run forward and backward, as often as num_backwards counts for one material."""

    @abstractmethod
    def _prepare(self, samples: MicroBatch) -> list[list[Material]]:
        """Roll out a micro-batch and return its materials, grouped by update."""

    def update(self) -> None:
        """Take one optimizer step; skip it, on all workers, if the gradient is not finite.

        Raise StepError if more than optimizer.max_skipped_updates in a row were skipped.
        """
        with self.metrics.timed("update"):
            grad_norm = self._engine.step()
        is_skipped = not math.isfinite(grad_norm)
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        self.metrics.add("skipped_updates", float(is_skipped))
        if is_skipped:
            self._report_skipped(grad_norm)
        else:
            self.metrics.add("grad_norm", grad_norm)

    def _report_skipped(self, grad_norm: float) -> None:
        where = f"step {self._step + 1}: the gradient's norm over all workers is {grad_norm}"
        if self._num_skipped > (allowed := self._config.optimizer.max_skipped_updates):
            raise StepError(
                f"{where}, and {self._num_skipped} updates in a row were skipped for that; "
                f"optimizer.max_skipped_updates is {allowed}"
            )
        if dist.get_rank() == 0:
            print(f"{where}; the update is skipped", flush=True)

    def _backward(self, what: str, loss: Tensor, pairs: Sequence[PromptPair]) -> None:
        """Add the gradient of a loss. One that is not finite is printed, and lets all workers skip the update."""
        if not loss.isfinite():
            print(f"{self._where(pairs)}: {what} is not finite", flush=True)
            loss = loss * math.nan  # or its gradient might be finite
        self._engine.backward(loss)

    def _rollout(self, samples: MicroBatch) -> Rollout:
        noise, conditioning = self._start_noise(samples), self._encode(samples.prompts)
        pairs, sampling = self._pairs(samples), self._sampling(samples)
        if samples.batch.clean is not None:
            return Rollout(noise, samples.batch.clean(samples.indices).to(noise.device), conditioning, pairs, sampling)
        rollout = roll_out(self._sampler, conditioning, noise, pairs, sampling)
        self._require_finite("a clean latent", rollout.clean, pairs)
        return rollout

    def _sampling(self, samples: MicroBatch) -> Sampling:
        return self._samplings[samples.batch.size]

    def _start_noise(self, samples: MicroBatch) -> Tensor:
        generators = [noise_generator(self._config.seed, samples.step, index) for index in samples.indices]
        return self._policy.draw_noise(generators, *samples.batch.size)

    def _pairs(self, samples: MicroBatch) -> tuple[PromptPair, ...]:
        seed, step = self._config.seed, samples.step
        words = [draw_words(self._config.control_words, seed, step, index) for index in samples.indices]
        return tuple(
            PromptPair(prompt, each.positive, each.negative)
            for prompt, each in zip(samples.prompts, words, strict=True)
        )

    def _image_draws(self, samples: MicroBatch, numbers: Sequence[int]) -> ImageDraws:
        """Return what the rewards need at random for each sample's images, whose numbers are given."""
        images = [(index, number) for index in samples.indices for number in numbers]
        config = self._config
        return draw_for_images(config.rewards, config.seed, samples.step, images, samples.batch.size)

    @contextmanager
    def _locate_errors(self, pairs: Sequence[PromptPair], place: str = "") -> Iterator[None]:
        """Turn an error of a reward or its response into a StepError that names step, worker and prompts."""
        try:
            yield
        except (ValueError, RewardRejected) as error:
            raise StepError(f"{self._where(pairs)}{place}: {error}") from error

    def _require_finite(self, what: str, values: Tensor, pairs: Sequence[PromptPair]) -> None:
        """Raise StepError if a value is not finite. `values` has a row for each pair."""
        is_finite = values.isfinite().flatten(1).all(dim=1)
        if not is_finite.all():
            wrong = [pair for pair, fine in zip(pairs, is_finite.tolist(), strict=True) if not fine]
            raise StepError(f"{self._where(wrong)}: {what} is not finite")

    def _where(self, pairs: Sequence[PromptPair]) -> str:
        prompts = ", ".join(dict.fromkeys(repr(pair.prompt) for pair in pairs))
        return f"step {self._step + 1}, worker {dist.get_rank()}, prompts {prompts}"
