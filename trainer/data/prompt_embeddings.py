"""Keep the conditioning of prompts on disk: `srpo encode-prompts` writes it, training reads it a prompt at a time.

    folder/manifest.json          which text encoders made it, with how many tokens, in which dtype
    folder/HASH.safetensors       prompts; prompt_embeds (num_prompts, tokens, channels), pooled (num_prompts, channels)

T5's padding is stored too: FLUX masks nothing, so the transformer attends to it and its values count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from services.config.fields import Frozen
from trainer.data.shards import MANIFEST, SHARD_SUFFIX, Shards
from trainer.model.text_encoders import COMPONENTS, Conditioning

_WHOLE_FILE_BYTES, _NUM_PARTS, _PART_BYTES = 1 << 24, 16, 1 << 20


class EmbeddingsError(ValueError):
    """The embeddings cannot be used; the text names prompts.embeddings_path, what is wrong, and the cure."""


class EmbeddingsManifest(Frozen):
    """What embeddings depend on besides the prompt: those of another manifest are another model's.

    >>> EmbeddingsManifest(text_encoders="5f2a…", max_sequence_length=512, dtype="bfloat16")
    """

    text_encoders: str
    """Their fingerprint."""

    max_sequence_length: int
    dtype: str


def fingerprint(source: Path) -> str:
    """Return a digest of a model's text encoders and tokenizers: files up to 16 MiB whole, larger ones by 16 parts."""
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for file in sorted(each for each in (source / component).rglob("*") if each.is_file()):
            content = _config_without_dtype(file) if file.name == "config.json" else _parts(file)
            digest.update(f"{file.relative_to(source)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _config_without_dtype(file: Path) -> bytes:
    """Return a config without the dtype to load in: a run names its own, and exported models have another."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    return json.dumps({key: settings[key] for key in sorted(settings) if key not in ("dtype", "torch_dtype")}).encode()


def _parts(file: Path) -> bytes:
    num_bytes = file.stat().st_size
    if num_bytes <= _WHOLE_FILE_BYTES:
        return file.read_bytes()
    starts = [(num_bytes - _PART_BYTES) * part // (_NUM_PARTS - 1) for part in range(_NUM_PARTS)]
    with file.open("rb") as content:
        return str(num_bytes).encode() + b"".join(_read_at(content, start) for start in starts)


def _read_at(content: BinaryIO, start: int) -> bytes:
    content.seek(start)
    return content.read(_PART_BYTES)


def prepare(folder: Path, manifest: EmbeddingsManifest) -> None:
    """Make a folder, new or begun with the same manifest, ready for `write_shard`. Raise EmbeddingsError otherwise."""
    shards = _shards(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards.remove_partial()
    if shards.has_manifest():
        _require_manifest(shards, manifest)
    elif shards.paths():
        raise EmbeddingsError(f"prompts.embeddings_path {folder} has files but no {MANIFEST}: give a new folder")
    else:
        shards.write_manifest(manifest)


def write_shard(folder: Path, prompts: Sequence[str], conditioning: Conditioning) -> Path:
    """Write the conditioning (num_prompts) of prompts as one file, whole or not at all. Return its path."""
    text = json.dumps(list(prompts))
    name = hashlib.sha256(text.encode()).hexdigest()[:16] + SHARD_SUFFIX
    tensors = {"prompt_embeds": conditioning.prompt_embeds, "pooled": conditioning.pooled}
    return _shards(folder).write(name, tensors, {"prompts": text})


class Embeddings:
    """The embeddings in a folder. It holds where each prompt is, and reads from there when asked."""

    def __init__(self, folder: Path) -> None:
        self._shards = _shards(folder)
        self._row_of: dict[str, tuple[Path, int]] = {}
        for path in self._shards.paths():
            for row, prompt in enumerate(json.loads(self._shards.read_metadata(path, "prompts"))):
                self._row_of[prompt] = path, row

    @classmethod
    def open(cls, folder: Path, manifest: EmbeddingsManifest | None) -> Embeddings:
        """Open a folder that `prepare` made with the same manifest (None: with any). Raise EmbeddingsError if not."""
        _require_manifest(_shards(folder), manifest)
        return cls(folder)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Return those of the prompts that are not there, each once, in their order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._row_of]

    def require(self, prompts: Iterable[str]) -> None:
        """Raise EmbeddingsError, with count and first prompt, if some are missing."""
        if missing := self.missing(prompts):
            raise EmbeddingsError(
                f"prompts.embeddings_path {self._shards.folder} lacks {len(missing)} of the run's prompts, "
                f"the first is {missing[0]!r}: {self._shards.cure}, which adds them"
            )

    def read(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """Return the conditioning of these prompts, in their order. Raise EmbeddingsError if one is missing."""
        self.require(prompts)
        rows = [self._shards.read_row(*self._row_of[prompt]) for prompt in prompts]
        prompt_embeds, pooled = (torch.cat([row[name] for row in rows]) for name in ("prompt_embeds", "pooled"))
        return Conditioning(prompt_embeds.to(device), pooled.to(device))


def _shards(folder: Path) -> Shards:
    return Shards(folder, "prompts.embeddings_path", "run `srpo encode-prompts RUN.yaml`", EmbeddingsError)


def _require_manifest(shards: Shards, manifest: EmbeddingsManifest | None) -> None:
    found = shards.read_manifest(EmbeddingsManifest)
    for name, value in manifest or found:
        if (other := getattr(found, name)) != value:
            raise EmbeddingsError(
                f"{shards.key} {shards.folder} was made with {name} {other}, the run has {value}: "
                "give the model and settings that made it, or a new folder"
            )
