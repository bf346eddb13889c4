"""The latents of a dataset's images on disk: a manifest and shards, written whole, read a few rows at a time.

    folder/manifest.json                       what was encoded with what, and each shard's captions
    folder/512x768-0d9f2c41a7be.safetensors    `latents` (num_images, tokens, channels), images of one size

A shard is named for what is in it (the VAE, the size and the images' bytes): what is there already need not be encoded
again, whatever was interrupted and whatever images came or went since. Captions may change without any encoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.config.fields import Frozen
from services.config.run import RunConfig
from trainer.data.buckets import Size
from trainer.data.captioned_images import DatasetError, list_images

_MANIFEST = "manifest.json"
_LATENTS = "latents"
_CURE = "run `srpo encode-images RUN.yaml`"


class Shard(Frozen):
    """Images of one size in one file: `names` and `captions`, one each, in the order of the file's rows."""

    file: str
    size: Size
    names: tuple[str, ...]
    captions: tuple[str, ...]


class Manifest(Frozen):
    """What was encoded with what; source_checksum is over the images' bytes and captions."""

    model: str
    vae_checksum: str
    dtype: str
    source: str
    source_checksum: str
    sizes: tuple[Size, ...]
    shards: tuple[Shard, ...]


class Bucket:
    """All encoded images of one size, in a fixed order."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._places = [(shard.file, row) for shard in shards for row in range(len(shard.captions))]
        self.names = tuple(name for shard in shards for name in shard.names)
        self.captions = tuple(caption for shard in shards for caption in shard.captions)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Clean latents of these images, (batch, tokens, channels) float32. Raises DatasetError for a damaged file."""
        return torch.cat([self._read_row(*self._places[row]) for row in rows])

    def _read_row(self, file: str, row: int) -> Tensor:
        path = self._folder / file
        try:
            with safe_open(path, framework="pt") as shard:  # maps the file: only the row is read
                return shard.get_slice(_LATENTS)[row : row + 1].float()
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"dataset.latents_path: cannot read {path} ({error}): delete it and {_CURE}") from error


class Latents:
    """The encoded images of a run, in buckets by size."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.source = manifest.source
        self._manifest, self._folder = manifest, folder

    @classmethod
    def open(cls, config: RunConfig, model_folder: Path | None = None) -> Latents:
        """Those at dataset.latents_path. Raises DatasetError unless they are this run's; the VAE is compared with that
        of `model_folder` where one is given."""
        dataset = config.dataset
        assert dataset is not None
        manifest = _read_manifest(dataset.latents_path)
        if set(manifest.sizes) != set(config.model.training_sizes):
            raise DatasetError(
                f"dataset.latents_path {dataset.latents_path} was encoded for sizes {told(manifest.sizes)}, and the "
                f"run trains {told(config.model.training_sizes)} (model.sizes): {_CURE}"
            )
        if Path(manifest.source).resolve() != dataset.path.resolve():
            raise DatasetError(
                f"dataset.latents_path {dataset.latents_path} was encoded from {manifest.source}, and dataset.path is "
                f"{dataset.path}: {_CURE}"
            )
        if manifest.dtype != config.model.dtype:
            raise DatasetError(
                f"dataset.latents_path {dataset.latents_path} was encoded in {manifest.dtype}, and model.dtype is "
                f"{config.model.dtype}: {_CURE}"
            )
        if model_folder is not None and vae_checksum(model_folder) != manifest.vae_checksum:
            raise DatasetError(
                f"dataset.latents_path {dataset.latents_path} was encoded by the VAE of {manifest.model}, which is not "
                f"that of model.path {config.model.path}: {_CURE}"
            )
        for shard in manifest.shards:
            if not (dataset.latents_path / shard.file).is_file():
                raise DatasetError(f"dataset.latents_path {dataset.latents_path} lacks {shard.file}: {_CURE}")
        latents = cls(manifest, dataset.latents_path)
        require_full_buckets(config, {size: len(bucket.captions) for size, bucket in latents.buckets.items()})
        return latents

    @cached_property
    def buckets(self) -> dict[Size, Bucket]:
        shards = self._manifest.shards
        return {
            size: Bucket(self._folder, [shard for shard in shards if shard.size == size])
            for size in self._manifest.sizes
        }


def require_unchanged(config: RunConfig) -> None:
    """Raise DatasetError where the images' names or captions are no longer those that were encoded.

    Opens no image: one that was painted over under its name goes unseen. A dataset that is not on this machine, as
    training needs none, is not looked at.
    """
    dataset = config.dataset
    if dataset is None or not dataset.path.exists():
        return
    shards = _read_manifest(dataset.latents_path).shards
    encoded = {pair for shard in shards for pair in zip(shard.names, shard.captions, strict=True)}
    if changed := sorted(encoded ^ {(image.name, image.caption) for image in list_images(dataset)}):
        names = list(dict.fromkeys(name for name, _ in changed))
        raise DatasetError(
            f"dataset.path {dataset.path} has changed since it was encoded into {dataset.latents_path}: {len(names)} "
            f"image(s) came, went or have another caption, the first is {names[0]}: {_CURE}"
        )


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """In one move, so that a reader sees the old one or the new one. Returns its path."""
    path, partial = folder / _MANIFEST, folder / f".{_MANIFEST}"
    partial.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def write_shard(path: Path, latents: Tensor) -> None:
    """As write_manifest: a file of a shard's name is a whole one."""
    partial = path.with_name(f".{path.name}")
    save_file({_LATENTS: latents.contiguous()}, partial)
    partial.replace(path)


def require_full_buckets(config: RunConfig, num_images: dict[Size, int]) -> None:
    """Raise DatasetError for a size with fewer images than a step takes, which are all of one size."""
    wanted = config.engine.global_batch
    for height, width in config.model.training_sizes:
        if (present := num_images.get((height, width), 0)) < wanted:
            every = ", ".join(f"{told([size])}: {count}" for size, count in num_images.items())
            raise DatasetError(
                f"dataset: the bucket {height} × {width} has {present or 'no'} images, fewer than engine.global_batch "
                f"{wanted} ({every}): take it out of model.sizes, add images of that shape, or lower global_batch"
            )


def vae_checksum(model_folder: Path) -> str:
    """Of the files of a diffusers folder's VAE: the same in whichever dtype it is loaded, and in exported models."""
    digest = hashlib.sha256()
    for file in sorted((model_folder / "vae").iterdir()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def told(sizes: Sequence[Size]) -> str:
    """
    >>> told([(512, 768), (768, 512)])
    '512 × 768, 768 × 512'
    """
    return ", ".join(f"{height} × {width}" for height, width in sizes)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(f"dataset.latents_path {folder} has no {_MANIFEST}: {_CURE}") from error
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise DatasetError(f"dataset.latents_path: {path} is no manifest of latents ({problem}): {_CURE}") from error
