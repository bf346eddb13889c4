"""`srpo encode-images RUN.yaml`: encode a dataset's images into latents once, by Ray Data.

Two passes. The first reads every image whole, so that whatever is wrong with the dataset is named before anything is
encoded. The second encodes the shards that are not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from services.config.dataset import DatasetConfig
from services.config.run import ConfigError, RunConfig, load_run_config
from services.pictures import PictureError
from trainer.data.buckets import Size, fit, nearest_size
from trainer.data.captioned_images import CaptionedImage, DatasetError, list_images
from trainer.data.latents import (
    LatentsManifest,
    ShardOfImages,
    format_sizes,
    latent_shards,
    require_full_buckets,
    vae_checksum,
    write_shard,
)
from trainer.jobs.encoding import EncodeError, Write, encode_shards, quiet_ray_data, with_progress
from trainer.model.loading import model_folder
from trainer.model.policy import Policy
from trainer.runtime.cluster import ClusterError, check_cluster, connect, worker_environment
from trainer.runtime.paths import with_absolute_paths

_IMAGES_PER_SHARD = 64
_NUM_DIGEST_CHARS = 12
_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class Scanned:
    """An image that was read: its size and the digest of its bytes, or the problem with it."""

    image: CaptionedImage
    size: Size = (0, 0)
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to write: its file, the size of its images, and the images."""

    file: str
    size: Size
    images: tuple[CaptionedImage, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 with a line on stderr."""
    parser = argparse.ArgumentParser(prog="srpo encode-images", description="Encode a run's dataset into latents.")
    parser.add_argument("run_file", type=Path)
    args = parser.parse_args(arguments)
    try:
        config = with_absolute_paths(load_run_config(args.run_file))
        images = images_of(config)
        check_cluster(os.environ.get("RAY_ADDRESS", ""))
        connect(config, num_workers=1)
        manifest = encode(config, images)
    except (ConfigError, EncodeError, ClusterError, ValueError, OSError, ray.exceptions.RayError) as error:
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    print(f"done: {manifest}")
    return 0


def images_of(config: RunConfig) -> list[CaptionedImage]:
    """Return the images to encode. Raise DatasetError."""
    if config.dataset is None:
        raise DatasetError("the run has no dataset, so that there is nothing to encode")
    return list_images(config.dataset)


def encode(config: RunConfig, images: Sequence[CaptionedImage]) -> Path:
    """Read, plan, encode what is missing, write the manifest on the cluster that this process has joined.

    Return the manifest's path. Raise DatasetError, ModelError or EncodeError.
    """
    dataset, source = config.dataset, model_folder(config.model.path)
    assert dataset is not None
    quiet_ray_data()
    scanned = require_readable(dataset, scan(config, images))
    warn_of_enlarged(config, scanned)
    checksum, folder = vae_checksum(source), dataset.latents_path
    planned = plan(config, checksum, scanned)
    folder.mkdir(parents=True, exist_ok=True)
    latent_shards(folder).remove_partial()
    if missing := [each for each in planned if not (folder / each.file).exists()]:
        num_images = sum(len(each.images) for each in missing)
        encode_shards(config, source, [asdict(each) for each in missing], image_encoder, num_images, "images")
    else:
        print("all images are encoded already")
    manifest = LatentsManifest(
        model=config.model.path,
        vae_checksum=checksum,
        dtype=config.vae_dtype,
        source=str(dataset.path),
        source_checksum=_digest(*((each.digest, each.image.caption) for each in scanned)),
        sizes=config.model.training_sizes,
        shards=tuple(_listed(each) for each in planned),
    )
    return latent_shards(folder).write_manifest(manifest)


def scan(config: RunConfig, images: Sequence[CaptionedImage]) -> list[Scanned]:
    """Read every image whole, by Ray Data, in the given order."""
    rows = [{"index": index, "image": json.dumps(asdict(image))} for index, image in enumerate(images)]
    found: dict[int, Scanned] = {}
    environment = {"env_vars": worker_environment(config)}
    answers = ray.data.from_items(rows).map(_scan, num_cpus=config.engine.cpus_per_worker, runtime_env=environment)
    for row in with_progress(answers, "read", len(images), "images"):
        size = int(row["height"]), int(row["width"])
        found[int(row["index"])] = Scanned(images[int(row["index"])], size, row["digest"], row["problem"])
    return [found[index] for index in range(len(images))]


def require_readable(dataset: DatasetConfig, scanned: list[Scanned]) -> list[Scanned]:
    """Return `scanned`. Raise DatasetError, which names the first few images that could not be read."""
    problems = [each.problem for each in scanned if each.problem]
    if problems:
        named = "; ".join(problems[:_NUM_NAMED]) + ("; …" if len(problems) > _NUM_NAMED else "")
        raise DatasetError(f"dataset.path {dataset.path}: {len(problems)} of {len(scanned)} images are bad: {named}")
    return scanned


def warn_of_enlarged(config: RunConfig, scanned: Sequence[Scanned]) -> None:
    """Print a warning if images are smaller than their size in training: they are used, but they teach blur."""
    sizes = config.model.training_sizes
    small = [
        each
        for each in scanned
        if any(have < want for have, want in zip(each.size, nearest_size(each.size, sizes), strict=True))
    ]
    if small:
        first, size = small[0], nearest_size(small[0].size, sizes)
        print(
            f"warning: {len(small)} of {len(scanned)} images are smaller than their size in training and are enlarged, "
            f"the first is {first.image.name}: {format_sizes([first.size])} to {format_sizes([size])}"
        )


def plan(config: RunConfig, vae: str, scanned: Sequence[Scanned]) -> list[PlannedShard]:
    """Assign images to shards by size, in the given order. Raise DatasetError for a bucket with too few images."""
    buckets: dict[Size, list[Scanned]] = defaultdict(list)
    for each in scanned:
        buckets[nearest_size(each.size, config.model.training_sizes)].append(each)
    require_full_buckets(config, {size: len(members) for size, members in buckets.items()})
    shards = []
    for size in config.model.training_sizes:
        members = buckets[size]
        for start in range(0, len(members), _IMAGES_PER_SHARD):
            chunk = members[start : start + _IMAGES_PER_SHARD]
            content = _digest(vae, config.vae_dtype, size, [each.digest for each in chunk])
            name = f"{size[0]}x{size[1]}-{content[:_NUM_DIGEST_CHARS]}.safetensors"
            shards.append(PlannedShard(name, size, tuple(each.image for each in chunk)))
    return shards


def image_encoder(config: RunConfig, source: Path) -> Write:
    """Load the VAE of `source`; return a function that encodes and writes a shard, a PlannedShard as a mapping."""
    assert config.dataset is not None
    folder, batch = config.dataset.latents_path, config.engine.micro_batch  # what fits into training fits here
    device = "cuda" if config.engine.use_gpu else "cpu"
    policy = Policy.load_vae(str(source), getattr(torch, config.vae_dtype), device)

    def write(shard: dict[str, Any]) -> int:
        images = [CaptionedImage(**each) for each in shard["images"]]
        parts = []
        for start in range(0, len(images), batch):
            pixels = [torch.from_numpy(each.read_pixels(each.read_bytes())) for each in images[start : start + batch]]
            stack = torch.stack([fit(each, tuple(shard["size"])) for each in pixels])
            parts.append(policy.encode_image(stack).to(policy.dtype))
        write_shard(folder, shard["file"], torch.cat(parts))
        return len(images)

    return write


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    image = CaptionedImage(**json.loads(row["image"]))
    try:
        data = image.read_bytes()
        _, height, width = image.read_pixels(data).shape
    except PictureError as error:
        return {"index": row["index"], "height": 0, "width": 0, "digest": "", "problem": str(error)}
    digest = hashlib.sha256(data).hexdigest()
    return {"index": row["index"], "height": height, "width": width, "digest": digest, "problem": ""}


def _listed(shard: PlannedShard) -> ShardOfImages:
    names, captions = (tuple(getattr(each, key) for each in shard.images) for key in ("name", "caption"))
    return ShardOfImages(file=shard.file, size=shard.size, names=names, captions=captions)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
