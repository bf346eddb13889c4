"""Write latents to disk as `srpo encode-images` does, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.latents import LatentsManifest, ShardOfImages, latent_shards, vae_checksum, write_shard


def write_latents(
    folder: Path,
    model: Path,
    source: Path,
    buckets: Mapping[Size, tuple[Tensor, Sequence[str]]],
    per_shard: int = 3,
    name: Callable[[str], str] = str,
) -> None:
    """Each size's latents (num_images, tokens, channels) and captions; `name` gives an image's by its caption."""
    folder.mkdir(exist_ok=True)
    shards = []
    for size, (latents, captions) in buckets.items():
        for start in range(0, len(latents), per_shard):
            file, said = f"{size[0]}x{size[1]}-{start}.safetensors", tuple(captions[start : start + per_shard])
            write_shard(folder, file, latents[start : start + per_shard])
            shards.append(ShardOfImages(file=file, size=size, names=tuple(map(name, said)), captions=said))
    manifest = LatentsManifest(
        model=str(model),
        vae_checksum=vae_checksum(model),
        dtype="float32",
        source=str(source),
        source_checksum="0",
        sizes=tuple(buckets),
        shards=tuple(shards),
    )
    latent_shards(folder).write_manifest(manifest)
