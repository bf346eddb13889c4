"""Keep the latents of a dataset's images on disk: `srpo encode-images` writes them, training reads a few rows a step.

    folder/manifest.json                       what was encoded with what, and each shard's captions
    folder/512x768-0d9f2c41a7be.safetensors    `latents` (num_images, tokens, channels), images of one size

A shard's name follows from what is in it (the VAE, the size, the images' bytes). So whatever was interrupted and
whichever images came or went, a shard that is there need not be encoded again. Captions may change without encoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from services.config.dataset import DatasetConfig
from services.config.fields import Frozen
from services.config.run import RunConfig
from trainer.data.buckets import Size
from trainer.data.captioned_images import DatasetError, list_images
from trainer.data.shards import Shards

_LATENTS = "latents"
_CURE = "run `srpo encode-images RUN.yaml`"


class ShardOfImages(Frozen):
    """The images of one size in one file; `names` and `captions` are in the order of its rows."""

    file: str
    size: Size
    names: tuple[str, ...]
    captions: tuple[str, ...]


class LatentsManifest(Frozen):
    """What was encoded with what; source_checksum is over the images' bytes and captions."""

    model: str
    vae_checksum: str
    dtype: str
    source: str
    source_checksum: str
    sizes: tuple[Size, ...]
    shards: tuple[ShardOfImages, ...]


class Bucket:
    """All encoded images of one size, in a fixed order."""

    def __init__(self, folder: Path, shards: Sequence[ShardOfImages]) -> None:
        self._shards = latent_shards(folder)
        self._places = [(folder / shard.file, row) for shard in shards for row in range(len(shard.captions))]
        self.names = tuple(name for shard in shards for name in shard.names)
        self.captions = tuple(caption for shard in shards for caption in shard.captions)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return the clean latents of these images, (batch, tokens, channels) float32. Raise DatasetError for a damaged
        file."""
        return torch.cat([self._shards.read_row(*self._places[row])[_LATENTS].float() for row in rows])


class Latents:
    """The encoded images of a run, in buckets by size."""

    def __init__(self, manifest: LatentsManifest, folder: Path) -> None:
        self.source = manifest.source
        self._manifest, self._folder = manifest, folder

    @classmethod
    def open(cls, config: RunConfig, model_folder: Path | None = None) -> Latents:
        """Open dataset.latents_path; compare its VAE with that of `model_folder` if one is given.

        Raise DatasetError unless the latents are this run's and every size has enough images for a step.
        """
        dataset = config.dataset
        assert dataset is not None
        folder = dataset.latents_path
        manifest = latent_shards(folder).read_manifest(LatentsManifest)
        if problem := _difference(config, dataset, manifest, model_folder):
            raise DatasetError(f"dataset.latents_path {folder} {problem}: {_CURE}")
        latents = cls(manifest, folder)
        require_full_buckets(config, {size: len(bucket.captions) for size, bucket in latents.buckets.items()})
        return latents

    @cached_property
    def buckets(self) -> dict[Size, Bucket]:
        shards = self._manifest.shards
        return {
            size: Bucket(self._folder, [shard for shard in shards if shard.size == size])
            for size in self._manifest.sizes
        }


def _difference(
    config: RunConfig, dataset: DatasetConfig, manifest: LatentsManifest, model_folder: Path | None
) -> str | None:
    """Say in what the latents are not those that the run would encode; None if they are."""
    sizes = config.model.training_sizes
    if set(manifest.sizes) != set(sizes):
        return (
            f"was encoded for sizes {format_sizes(manifest.sizes)}, and the run trains {format_sizes(sizes)} "
            "(model.sizes)"
        )
    if Path(manifest.source).resolve() != dataset.path.resolve():
        return f"was encoded from {manifest.source}, and dataset.path is {dataset.path}"
    if manifest.dtype != config.vae_dtype:
        return f"was encoded in {manifest.dtype}, and the VAE's dtype (model.vae_dtype) is {config.vae_dtype}"
    if model_folder is not None and vae_checksum(model_folder) != manifest.vae_checksum:
        return f"was encoded by the VAE of {manifest.model}, which is not that of model.path {config.model.path}"
    missing = [shard.file for shard in manifest.shards if not (dataset.latents_path / shard.file).is_file()]
    return f"lacks {missing[0]}" if missing else None


def require_unchanged(config: RunConfig) -> None:
    """Raise DatasetError if the images' names or captions are no longer those that were encoded.

    No image is opened: one that was painted over under its name goes unseen. A dataset that is not on this machine is
    not looked at, as training does not need it.
    """
    dataset = config.dataset
    if dataset is None or not dataset.path.exists():
        return
    shards = latent_shards(dataset.latents_path).read_manifest(LatentsManifest).shards
    encoded = {pair for shard in shards for pair in zip(shard.names, shard.captions, strict=True)}
    if changed := sorted(encoded ^ {(image.name, image.caption) for image in list_images(dataset)}):
        names = list(dict.fromkeys(name for name, _ in changed))
        raise DatasetError(
            f"dataset.path {dataset.path} has changed since it was encoded into {dataset.latents_path}: {len(names)} "
            f"image(s) came, went or have another caption, the first is {names[0]}: {_CURE}"
        )


def write_shard(folder: Path, file: str, latents: Tensor) -> Path:
    """Write latents (num_images, tokens, channels) as the shard `file`, whole or not at all. Return its path."""
    return latent_shards(folder).write(file, {_LATENTS: latents})


def latent_shards(folder: Path) -> Shards:
    """Return the folder as dataset.latents_path."""
    return Shards(folder, "dataset.latents_path", _CURE, DatasetError)


def require_full_buckets(config: RunConfig, num_images: dict[Size, int]) -> None:
    """Raise DatasetError for a size with fewer images than a step takes: all images of a step have one size."""
    wanted = config.engine.global_batch
    for height, width in config.model.training_sizes:
        if (present := num_images.get((height, width), 0)) < wanted:
            every = ", ".join(f"{format_sizes([size])}: {count}" for size, count in num_images.items())
            raise DatasetError(
                f"dataset: the bucket {height} × {width} has {present or 'no'} images, fewer than engine.global_batch "
                f"{wanted} ({every}): take it out of model.sizes, add images of that shape, or lower global_batch"
            )


def vae_checksum(model_folder: Path) -> str:
    """Return a digest of the files of a diffusers folder's VAE: the same for any dtype, and in exported models."""
    digest = hashlib.sha256()
    for file in sorted((model_folder / "vae").iterdir()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def format_sizes(sizes: Sequence[Size]) -> str:
    """
    >>> format_sizes([(512, 768), (768, 512)])
    '512 × 768, 768 × 512'
    """
    return ", ".join(f"{height} × {width}" for height, width in sizes)
