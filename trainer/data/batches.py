"""Give each step its global batch: prompts to roll out, or real images with captions; always of one size.

    batches = open_batches(config)
    batch = batches.batch(step)
    batch.size, batch.prompts        # one prompt a sample; batch.clean reads a dataset's latents

A batch follows from (seed, step) alone: any number of workers and micro-batches see the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from services.config.prompts import PromptsPath
from services.config.run import RunConfig
from trainer.data.buckets import Size
from trainer.data.latents import Latents
from trainer.data.prompt_files import LocatedPrompt, PromptsError, locate_prompts
from trainer.draws import batch_indices, draw_bucket


@dataclass(frozen=True, slots=True)
class Batch:
    """The prompts by sample index. `clean` returns samples' latents (batch, tokens, channels); None: roll them out."""

    size: Size
    prompts: tuple[str, ...]
    clean: Callable[[Sequence[int]], Tensor] | None = None


class PromptBatches:
    """Batches of prompts from shuffled epochs. Each step has one of the run's sizes, all equally often."""

    def __init__(self, config: RunConfig, located: Sequence[LocatedPrompt]) -> None:
        self.located = located
        self._config = config

    def batch(self, step: int) -> Batch:
        seed, sizes = self._config.seed, self._config.model.training_sizes
        order = batch_indices(seed, step, self._config.engine.global_batch, len(self.located))
        size = sizes[draw_bucket(seed, step, [1] * len(sizes))]
        return Batch(size, tuple(self.located[index].prompt for index in order))


class ImageBatches:
    """Batches of encoded images. Each step draws a bucket by its number of images, then takes its next images."""

    def __init__(self, config: RunConfig, latents: Latents) -> None:
        self._config, self._buckets = config, list(latents.buckets.items())
        self.located = [
            LocatedPrompt(caption, f"dataset.path {latents.source}, {name}")
            for _, bucket in self._buckets
            for name, caption in zip(bucket.names, bucket.captions, strict=True)
        ]
        weights = [len(bucket.captions) for _, bucket in self._buckets]
        self._drawn = [draw_bucket(config.seed, step, weights) for step in range(config.num_steps)]

    def batch(self, step: int) -> Batch:
        drawn = self._drawn[step]
        size, bucket = self._buckets[drawn]
        turn = self._drawn[:step].count(drawn)  # earlier steps with this bucket
        rows = batch_indices(self._config.seed, turn, self._config.engine.global_batch, len(bucket.captions))
        prompts = tuple(bucket.captions[row] for row in rows)
        return Batch(size, prompts, lambda indices: bucket.read([rows[index] for index in indices]))


def open_batches(config: RunConfig, model_folder: Path | None = None) -> PromptBatches | ImageBatches:
    """Open the prompts or the dataset that the run names. Raise PromptsError or DatasetError.

    `model_folder` is passed on to Latents.open.
    """
    if config.prompts.path is not None:
        return PromptBatches(config, located_prompts(config, "prompts.path", config.prompts.path))
    return ImageBatches(config, Latents.open(config, model_folder))


def located_prompts(config: RunConfig, key: str, path: PromptsPath) -> list[LocatedPrompt]:
    """Read the prompts that the run file names under `key`. Raise PromptsError, which names the key as well."""
    try:
        return locate_prompts(path, config.prompts.column)
    except PromptsError as error:
        raise PromptsError(f"{key}: {error}") from error
