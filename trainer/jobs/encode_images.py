"""`srpo encode-images RUN.yaml`: encode a dataset's images into latents once, by Ray Data.

Two passes: every image is read whole, so that all that is wrong with the dataset is said before anything is encoded;
then shards that are not there yet are encoded by engine.num_workers actors that hold a VAE each. An interrupted job
leaves whole shards only, and the next one goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from services.config.dataset import DatasetConfig
from services.config.engine import EngineConfig
from services.config.run import ConfigError, RunConfig, load_run_config
from services.pictures import PictureError
from trainer.data.buckets import Size, fit, nearest_size
from trainer.data.captioned_images import CaptionedImage, DatasetError, list_images
from trainer.data.latents import Manifest, Shard, require_full_buckets, told, vae_checksum, write_manifest, write_shard
from trainer.launch import connect, with_absolute_paths, worker_environment
from trainer.model.loading import model_folder
from trainer.model.policy import Policy

_IMAGES_PER_SHARD = 64
_NUM_DIGEST_CHARS = 12
_NUM_NAMED = 5
_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Scanned:
    """What reading an image told: its size and the digest of its bytes, or the problem with it."""

    image: CaptionedImage
    size: Size = (0, 0)
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file to be, and what goes into it."""

    file: str
    size: Size
    images: tuple[CaptionedImage, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="srpo encode-images", description="Encode a run's dataset into latents.")
    parser.add_argument("run_file", type=Path)
    args = parser.parse_args(arguments)
    try:
        config = with_absolute_paths(load_run_config(args.run_file))
        images = listed_images(config)
        connect(config)
        manifest = encode(config, images)
    except (ConfigError, ValueError, OSError, ray.exceptions.RayError) as error:
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    print(f"done: {manifest}")
    return 0


def listed_images(config: RunConfig) -> list[CaptionedImage]:
    """What there is to encode. Raises DatasetError."""
    if config.dataset is None:
        raise DatasetError("the run has no dataset, so that there is nothing to encode")
    return list_images(config.dataset)


def encode(config: RunConfig, images: Sequence[CaptionedImage]) -> Path:
    """Read, plan, encode what is missing, write the manifest. Returns its path. Raises DatasetError or ModelError.

    Runs on the cluster that this process has joined.
    """
    dataset, source = config.dataset, model_folder(config.model.path)
    assert dataset is not None
    _quieten()
    scanned = require_readable(dataset, scan(config, images))
    warn_of_enlarged(config, scanned)
    checksum = vae_checksum(source)
    shards = plan(config, checksum, scanned)
    dataset.latents_path.mkdir(parents=True, exist_ok=True)
    encode_shards(config, source, [each for each in shards if not (dataset.latents_path / each.file).exists()])
    manifest = Manifest(
        model=config.model.path,
        vae_checksum=checksum,
        dtype=config.model.dtype,
        source=str(dataset.path),
        source_checksum=_digest(*((each.digest, each.image.caption) for each in scanned)),
        sizes=config.model.training_sizes,
        shards=tuple(_listed(each) for each in shards),
    )
    return write_manifest(dataset.latents_path, manifest)


def scan(config: RunConfig, images: Sequence[CaptionedImage]) -> list[Scanned]:
    """Read every image whole, by Ray Data, in the given order."""
    rows = [{"index": index, "image": json.dumps(asdict(image))} for index, image in enumerate(images)]
    found: dict[int, Scanned] = {}
    environment = {"env_vars": worker_environment(config)}
    answers = ray.data.from_items(rows).map(_scan, num_cpus=config.engine.cpus_per_worker, runtime_env=environment)
    for row in _with_progress("read", answers, len(images)):
        size = int(row["height"]), int(row["width"])
        found[int(row["index"])] = Scanned(images[int(row["index"])], size, row["digest"], row["problem"])
    return [found[index] for index in range(len(images))]


def require_readable(dataset: DatasetConfig, scanned: list[Scanned]) -> list[Scanned]:
    """The same. Raises DatasetError naming the images that could not be read, a few of them if they are many."""
    problems = [each.problem for each in scanned if each.problem]
    if problems:
        named = "; ".join(problems[:_NUM_NAMED]) + ("; …" if len(problems) > _NUM_NAMED else "")
        raise DatasetError(f"dataset.path {dataset.path}: {len(problems)} of {len(scanned)} images are bad: {named}")
    return scanned


def warn_of_enlarged(config: RunConfig, scanned: Sequence[Scanned]) -> None:
    """Images smaller than their bucket are used, but they teach blur: say so."""
    sizes = config.model.training_sizes
    small = [
        each
        for each in scanned
        if any(have < want for have, want in zip(each.size, nearest_size(each.size, sizes), strict=True))
    ]
    if small:
        first = small[0]
        print(
            f"warning: {len(small)} of {len(scanned)} images are smaller than their size in training and are enlarged, "
            f"the first is {first.image.name}: {told([first.size])} to {told([nearest_size(first.size, sizes)])}"
        )


def plan(config: RunConfig, vae: str, scanned: Sequence[Scanned]) -> list[PlannedShard]:
    """Which image goes to which shard: by size, in the given order. Raises DatasetError for a bucket too empty."""
    buckets: dict[Size, list[Scanned]] = defaultdict(list)
    for each in scanned:
        buckets[nearest_size(each.size, config.model.training_sizes)].append(each)
    require_full_buckets(config, {size: len(members) for size, members in buckets.items()})
    shards = []
    for size in config.model.training_sizes:
        members = buckets[size]
        for start in range(0, len(members), _IMAGES_PER_SHARD):
            chunk = members[start : start + _IMAGES_PER_SHARD]
            content = _digest(vae, config.model.dtype, size, [each.digest for each in chunk])
            name = f"{size[0]}x{size[1]}-{content[:_NUM_DIGEST_CHARS]}.safetensors"
            shards.append(PlannedShard(name, size, tuple(each.image for each in chunk)))
    return shards


def encode_shards(config: RunConfig, source: Path, shards: Sequence[PlannedShard]) -> None:
    """Encode and write them, by Ray Data, a shard at a time on each actor."""
    assert config.dataset is not None
    engine, total = config.engine, sum(len(each.images) for each in shards)
    if not shards:
        print("all images are encoded already")
        return
    rows = [{"shard": json.dumps(asdict(each))} for each in shards]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardEncoder,
        fn_constructor_args=(str(source), config.model.dtype, engine, config.dataset.latents_path),
        compute=ray.data.ActorPoolStrategy(size=min(engine.num_workers, len(rows))),
        num_cpus=engine.cpus_per_worker,
        num_gpus=int(engine.use_gpu),
        runtime_env={"env_vars": worker_environment(config)},
    )
    for _ in _with_progress("encoded", written, total, counted="num_images"):
        pass


class ShardEncoder:
    """An actor of Ray Data: a VAE, and what it does with a shard."""

    def __init__(self, source: str, dtype: str, engine: EngineConfig, folder: Path) -> None:
        torch.set_num_threads(engine.threads_per_worker)
        device = "cuda" if engine.use_gpu else "cpu"
        self._policy, self._folder = Policy.load_vae(source, getattr(torch, dtype), device), folder
        self._batch = engine.micro_batch  # what fits into training fits here

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tree = json.loads(row["shard"])
        size, images = tuple(tree["size"]), [CaptionedImage(**each) for each in tree["images"]]
        parts = []
        for start in range(0, len(images), self._batch):
            chunk = [each.read_pixels(each.read_bytes()) for each in images[start : start + self._batch]]
            stack = torch.stack([fit(torch.from_numpy(pixels), size) for pixels in chunk])
            parts.append(self._policy.encode_image(stack).to(self._policy.dtype).cpu())
        write_shard(self._folder / tree["file"], torch.cat(parts))
        return {"num_images": len(images)}


def _scan(row: dict[str, Any]) -> dict[str, Any]:
    image = CaptionedImage(**json.loads(row["image"]))
    try:
        data = image.read_bytes()
        _, height, width = image.read_pixels(data).shape
    except PictureError as error:
        return {"index": row["index"], "height": 0, "width": 0, "digest": "", "problem": str(error)}
    digest = hashlib.sha256(data).hexdigest()
    return {"index": row["index"], "height": height, "width": width, "digest": digest, "problem": ""}


def _with_progress(verb: str, rows: ray.data.Dataset, total: int, counted: str | None = None) -> Iterator[Any]:
    """The rows as they come, and every few seconds a line that tells how many images are done."""
    started = told_at = time.monotonic()
    done = 0
    for row in rows.iter_rows():
        done += row[counted] if counted else 1
        now = time.monotonic()
        if now - told_at > _PROGRESS_EVERY_S or done == total:
            told_at, left = now, (now - started) / done * (total - done)
            print(f"{verb} {done}/{total} images  {now - started:.0f} s  ETA {left:.0f} s", flush=True)
        yield row


def _listed(shard: PlannedShard) -> Shard:
    names, captions = (tuple(getattr(each, key) for each in shard.images) for key in ("name", "caption"))
    return Shard(file=shard.file, size=shard.size, names=names, captions=captions)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _quieten() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # drawn for terminals; the lines of _with_progress are for logs
    logging.getLogger("ray.data").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
