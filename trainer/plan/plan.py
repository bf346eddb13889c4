"""Add up a plan: the memory of each GPU and host by kind and by moment, and the disk of the run. Pure.

plan = make_plan(run, configs, accelerator, mfu=0.4)
plan.peak.total_bytes <= accelerator.memory_bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from trainer.plan.accelerators import GIB, Accelerator
from trainer.plan.checkpoint_configs import CheckpointConfigs
from trainer.plan.phases import Branch, Sizes, play_branch, play_decoding, play_forward
from trainer.plan.planned_run import PlannedRun
from trainer.plan.sharding import Layout, Sharded, sharded
from trainer.plan.tape import FLOAT32_BYTES, Shape

_WORKSPACE_BYTES = GIB  # cuBLAS, cuDNN and what the allocator cannot use: some 0.5 to 1.5 GiB in practice
_NCCL_BYTES = GIB // 2  # channels of two communicators
_PROCESS_BYTES = 3 * GIB // 2  # of host memory: Python, torch, Ray, without weights


@dataclass(frozen=True, slots=True)
class Moment:
    """A time at which much is alive on a worker: bytes by kind."""

    name: str
    kinds: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs, before it runs."""

    run: PlannedRun
    configs: CheckpointConfigs
    accelerator: Accelerator | None

    @cached_property
    def largest_size(self) -> tuple[int, int]:
        return max((*self.run.sizes, self.run.evaluation_size), key=prod)

    def sizes(self, batch: int, size: tuple[int, int], itemsize: int | None = None) -> Sizes:
        run = self.run
        grid = self.configs.token_grid(*size)
        itemsize = run.itemsize if itemsize is None else itemsize
        return Sizes(batch, grid, run.num_text_tokens, itemsize, run.vae_itemsize, run.use_gpu)

    @cached_property
    def branch(self) -> Branch:
        """A forward with gradient and its backward, at the largest size of training."""
        run = self.run
        sizes = self.sizes(run.micro_batch, max(run.sizes, key=prod))
        return play_branch(
            self.configs.transformer,
            self.configs.vae,
            sizes,
            run.training,
            run.checkpointing,
            decodes=run.has_decoder_gradient,
        )

    @cached_property
    def trained(self) -> dict[str, Shape]:
        return dict(self.branch.trained)

    @cached_property
    def num_trained(self) -> int:
        return sum(map(prod, self.trained.values()))

    @cached_property
    def num_base(self) -> int:
        """The numbers of the transformer, without an adapter."""
        return sum(map(prod, self.configs.transformer_shapes.values()))

    @cached_property
    def sharded(self) -> Sharded:
        run = self.run
        layout = Layout(run.zero_stage, run.num_workers, run.itemsize, run.use_gpu, run.deepspeed)
        frozen = self.configs.transformer_shapes if run.is_lora else {}
        return sharded(layout, self.trained, int(self.num_base * run.base_bytes) if run.is_lora else 0, frozen)

    @cached_property
    def average_bytes(self) -> int:
        return self.sharded.own * FLOAT32_BYTES if self.run.has_ema else 0

    @property
    def embedding_bytes(self) -> int:
        """Of one encoded prompt."""
        config = self.configs.transformer
        numbers = self.run.num_text_tokens * config.text_channels + config.pooled_channels
        return numbers * self.run.text_itemsize

    @cached_property
    def moments(self) -> list[Moment]:
        """What is alive on a GPU, or in a worker on a CPU, when it may be most."""
        run, parts = self.run, self.sharded
        text = self.configs.num_text_parameters * run.text_itemsize if run.encodes_prompts else 0
        held = {
            "weights": parts.weights,
            "master weights": parts.masters,
            "VAE": self.configs.num_vae_parameters * run.vae_itemsize,
            "workspace and NCCL": _WORKSPACE_BYTES + _NCCL_BYTES * (run.num_workers > 1) if run.use_gpu else 0,
            "EMA": self.average_bytes,
        }
        base = self.num_base * run.itemsize if run.zero_stage == 3 else 0
        loading = {**held, "whole weights": base, "text encoders": text}
        training = {**held, "moments": parts.moments, "prompt embeddings": run.num_prompts * self.embedding_bytes}
        largest = max(map(prod, self.configs.transformer_shapes.values())) * run.itemsize
        whole = {"gathered weights": parts.gathered, "a layer's weights": largest if run.quantization else 0}
        forward, decoding = self._drawing(run.evaluation_batch, run.evaluation_size, run.itemsize)
        is_whole = run.zero_stage == 3 or (run.is_lora and run.quantization is None)
        merged = self.num_base * run.itemsize if is_whole else 0  # a quantized base is merged shard by shard
        moments = [
            Moment("loading and encoding", loading),
            Moment("branch", {**training, **whole, **self._branch_kinds()}),
            Moment("update", {**training, "gradients": parts.gradients, "update": parts.updating}),
            Moment("evaluation", {**training, **whole, "activations": forward, "VAE decode": decoding}),
            Moment("export", {**training, "whole weights": merged}),
        ]
        if run.rolls_out:
            size = max(run.sizes, key=prod)
            rollout, _ = self._drawing(run.micro_batch, size, run.rollout_itemsize)
            moments.insert(1, Moment("rollout", {**training, **whole, "activations": rollout}))
        return moments

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda each: each.total_bytes)

    @cached_property
    def host_kinds(self) -> dict[str, int]:
        """Bytes of memory of a host beside its GPUs; on CPUs with all that its workers hold."""
        run, parts = self.run, self.sharded
        state = (parts.own * 3) * FLOAT32_BYTES + self.average_bytes
        loaded = self.num_base * run.itemsize + self.configs.num_vae_parameters * run.vae_itemsize
        if run.encodes_prompts:
            loaded += self.configs.num_text_parameters * run.text_itemsize
        kinds = {"processes": _PROCESS_BYTES, "copy for a checkpoint": state}
        kinds |= {"loading": loaded} if run.use_gpu else {"worker": self.peak.total_bytes}
        per_worker = {name: size * run.gpus_per_host for name, size in kinds.items()}
        return per_worker | {"export": self.num_base * run.itemsize}

    @property
    def host_bytes(self) -> int:
        """The most at once: a checkpoint's copy, loading and export do not meet."""
        kinds = dict(self.host_kinds)
        processes = kinds.pop("processes") + kinds.pop("worker", 0)
        return processes + max(kinds.values())

    @cached_property
    def disk_kinds(self) -> dict[str, int]:
        """Bytes that the whole run writes and keeps."""
        run, configs = self.run, self.configs
        state = self.num_trained * FLOAT32_BYTES * (4 if run.has_ema else 3)
        others = configs.num_vae_parameters * run.vae_itemsize + configs.num_text_parameters * run.text_itemsize
        pictures = run.num_evaluation_images * 3 * prod(run.evaluation_size)
        return {
            "checkpoints": state * (run.num_checkpoints_kept + 1),
            "model": self.num_base * run.itemsize + others,
            "adapter": self.num_trained * run.itemsize if run.is_lora else 0,
            "pictures": pictures,
        }

    @property
    def available_bytes(self) -> int | None:
        return None if self.accelerator is None else self.accelerator.memory_bytes

    @property
    def needed_bytes(self) -> int:
        """What is compared with the memory: a GPU's, or on CPUs a host's."""
        return self.peak.total_bytes if self.run.use_gpu else self.host_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None if no accelerator is known."""
        return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes

    def _branch_kinds(self) -> dict[str, int]:
        branch, parts = self.branch, self.sharded
        images = self.run.micro_batch * 3 * prod(max(self.run.sizes, key=prod)) * FLOAT32_BYTES
        reward = 2 * images * self.run.has_decoder_gradient  # the images and their gradient, both in the peak
        alone = branch.transformer.peak_bytes
        return {
            "gradients": parts.gradients,
            "gradient buckets": parts.buckets,
            "activations": alone,
            "VAE decode": max(branch.peak_bytes - alone - reward, 0),
            "reward images": min(reward, branch.peak_bytes - alone),
        }

    def _drawing(self, batch: int, size: tuple[int, int], itemsize: int) -> tuple[int, int]:
        """The peak of a forward without gradient, and how much more that of its decoding is."""
        sizes = self.sizes(batch, size, itemsize)
        forward = play_forward(self.configs.transformer, sizes).peak_bytes
        decoding = play_decoding(self.configs.vae, sizes).peak_bytes
        return forward, max(decoding - forward, 0)
