"""Draw images of fixed prompts from fixed noise, on one worker or on all together, and save them with numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.config.run import RunConfig
from trainer.algorithm.rollout import Sampling, sample
from trainer.data.conditioning import Encode
from trainer.data.prompt_files import load_prompts
from trainer.data.run_prompts import told_prompts
from trainer.draws import evaluation_generator
from trainer.model.policy import Policy

Draw = Callable[[Sequence[int]], Tensor]  # indices of a set's images -> images (num_images, 3, height, width) uint8


@dataclass(frozen=True, slots=True)
class PictureSet:
    """The images that every evaluation of a run draws: one prompt for each, in fixed order; repeats differ in noise."""

    prompts: tuple[str, ...]
    seed: int
    batch: int
    sampling: Sampling
    generator: Callable[[int, int], torch.Generator] = evaluation_generator  # of (seed, image_index)

    def shard(self, num_images: int, rank: int, world_size: int) -> list[int]:
        """Return the indices of the first `num_images` that one worker draws: every world_size-th.

        Shards are equally long, filled up with the last index: ZeRO stage 3 needs the same number of forwards on every
        worker, and gather needs equal shapes.
        """
        num_rounds = math.ceil(num_images / world_size)
        return [min(rank + turn * world_size, num_images - 1) for turn in range(num_rounds)]

    def own_prompts(self) -> list[str]:
        """Return the prompts of this worker's shard of all images."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return [self.prompts[index] for index in self.shard(len(self.prompts), rank, world_size)]

    def chunks(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Return the indices in parts of `batch`, which are drawn at once."""
        return [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]

    def draw(
        self,
        policy: Policy,
        encode: Encode,
        num_images: int,
    ) -> Tensor | None:
        """Draw the first `num_images` images. Return (num_images, 3, height, width) uint8 on worker 0, None elsewhere.

        All workers call this together. `encode` gives the conditioning of prompts of this worker's shard.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        chunks = self.chunks(self.shard(num_images, rank, world_size))
        images = torch.cat([self.draw_chunk(policy, encode, chunk) for chunk in chunks])
        parts = [torch.empty_like(images) for _ in range(world_size)] if rank == 0 else None
        dist.gather(images, parts)
        return torch.stack(parts, dim=1).flatten(0, 1)[:num_images].cpu() if parts else None

    def draw_alone(self, policy: Policy, encode: Encode) -> Tensor:
        """Draw all images in this process alone. Return (num_images, 3, height, width) uint8."""
        chunks = self.chunks(range(len(self.prompts)))
        return torch.cat([self.draw_chunk(policy, encode, chunk) for chunk in chunks]).cpu()

    @torch.no_grad()
    def draw_chunk(self, policy: Policy, encode: Encode, indices: Sequence[int]) -> Tensor:
        """Draw the images of these indices at once: (num_indices, 3, height, width) uint8 on the policy's device."""
        size = self.sampling.height_px, self.sampling.width_px
        noise = policy.draw_noise([self.generator(self.seed, index) for index in indices], *size)
        conditioning = encode([self.prompts[index] for index in indices])
        return to_uint8(policy.decode_image(sample(policy, conditioning, noise, self.sampling), *size))


def evaluation_pictures(config: RunConfig, shift: float) -> PictureSet:
    """Return the images of an evaluation: every held-out prompt, num_images_per_prompt times."""
    evaluation, size = config.evaluation, (config.model.height_px, config.model.width_px)
    labels = load_prompts(evaluation.prompts_path, config.prompts.column)
    prompts = tuple(label for label in labels for _ in range(evaluation.num_images_per_prompt))
    sampling = Sampling(evaluation.num_steps, evaluation.guidance_scale, shift, *size)
    return PictureSet(prompts, config.seed, evaluation.batch, sampling)


def oracle_pictures(config: RunConfig, shift: float) -> PictureSet | None:
    """Return the evaluation's images with each prompt under the positive control word; None if they are not wanted."""
    pictures = evaluation_pictures(config, shift)
    told = replace(pictures, prompts=told_prompts(config, pictures.prompts))
    return told if config.evaluation.draws_oracle else None


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The images that one policy drew, (num_images, 3, height, width) uint8, and their numbers by metric name."""

    images: Tensor
    numbers: dict[str, float]

    def save(self, path: Path) -> None:
        """Write images and numbers to one safetensors file, which is whole or absent whenever this process dies."""
        draft = path.with_suffix(".draft")
        save_file({"images": self.images}, draft, metadata={"numbers": json.dumps(self.numbers)})
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("images"), json.loads(file.metadata()["numbers"]))


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits, contiguous as files need them: an autoencoder returns channels last."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8, memory_format=torch.contiguous_format)
