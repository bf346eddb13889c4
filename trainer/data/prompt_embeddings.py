"""Conditioning of prompts on disk: what `srpo encode-prompts` writes and training reads, a prompt at a time.

    folder/manifest.json          which text encoders made it, with how many tokens, in which dtype
    folder/HASH.safetensors       prompts; prompt_embeds (num_prompts, tokens, channels), pooled (num_prompts, channels)

T5's padding is stored too: FLUX masks nothing, so that the transformer attends to it and its values count. A shard has
its name only once it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainer.model.text_encoders import COMPONENTS, Conditioning

_MANIFEST = "manifest.json"
_SHARD = ".safetensors"
_PARTIAL = ".partial"  # a file that is being written
_CURE = "`srpo encode-prompts RUN.yaml` writes it"
_WHOLE_FILE_BYTES, _NUM_PARTS, _PART_BYTES = 1 << 24, 16, 1 << 20


class EmbeddingsError(ValueError):
    """The embeddings cannot be used; the text names prompts.embeddings_path, what is wrong, and the cure."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What embeddings depend on beside the prompt: those of another manifest are another model's.

    >>> Manifest(text_encoders="5f2a…", max_sequence_length=512, dtype="bfloat16")
    """

    text_encoders: str  # fingerprint
    max_sequence_length: int
    dtype: str


def fingerprint(source: Path) -> str:
    """Of a model's text encoders and tokenizers: their files, up to 16 MiB whole, of larger ones 16 even parts."""
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for file in sorted(each for each in (source / component).rglob("*") if each.is_file()):
            num_bytes = file.stat().st_size
            digest.update(f"{file.relative_to(source)} {num_bytes}\n".encode())
            with file.open("rb") as content:
                if num_bytes <= _WHOLE_FILE_BYTES:
                    digest.update(content.read())
                    continue
                for part in range(_NUM_PARTS):
                    content.seek((num_bytes - _PART_BYTES) * part // (_NUM_PARTS - 1))
                    digest.update(content.read(_PART_BYTES))
    return digest.hexdigest()[:16]


def prepare(folder: Path, manifest: Manifest) -> None:
    """Make the folder ready for `write_shard`: new, or begun with the same manifest. Raises EmbeddingsError."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(f"*{_PARTIAL}"):  # of a job that was killed
        partial.unlink()
    if (folder / _MANIFEST).is_file():
        _require_manifest(folder, manifest)
        return
    if any(folder.glob(f"*{_SHARD}")):
        raise EmbeddingsError(f"prompts.embeddings_path {folder} has files but no {_MANIFEST}: give a new folder")
    partial = folder / (_MANIFEST + _PARTIAL)
    partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _MANIFEST)


def write_shard(folder: Path, prompts: Sequence[str], conditioning: Conditioning) -> Path:
    """Write the conditioning (num_prompts) of prompts as one file, whole or not at all. Returns its path."""
    text = json.dumps(list(prompts))
    path = folder / (hashlib.sha256(text.encode()).hexdigest()[:16] + _SHARD)
    partial = path.with_name(path.name + _PARTIAL)
    tensors = {"prompt_embeds": conditioning.prompt_embeds, "pooled": conditioning.pooled}
    with partial.open("wb") as file:
        file.write(save({name: each.cpu().contiguous() for name, each in tensors.items()}, {"prompts": text}))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


class Embeddings:
    """The embeddings in a folder. It holds where each prompt is, and reads from there when asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._row_of: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob(f"*{_SHARD}")):
            for row, prompt in enumerate(_prompts_in(path)):
                self._row_of[prompt] = path, row

    @classmethod
    def open(cls, folder: Path, manifest: Manifest | None) -> Embeddings:
        """Raises EmbeddingsError for a folder that is none, or whose embeddings another model made (None: any)."""
        if not (folder / _MANIFEST).is_file():
            raise EmbeddingsError(f"prompts.embeddings_path {folder} has no {_MANIFEST}: {_CURE}")
        if manifest is not None:
            _require_manifest(folder, manifest)
        return cls(folder)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts that have not been embedded, each once, in their order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._row_of]

    def require(self, prompts: Iterable[str]) -> None:
        """Raise EmbeddingsError, with count and first prompt, where some are missing."""
        if missing := self.missing(prompts):
            raise EmbeddingsError(
                f"prompts.embeddings_path {self._folder} lacks {len(missing)} of the run's prompts, "
                f"the first is {missing[0]!r}: `srpo encode-prompts RUN.yaml` adds them"
            )

    def read(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """The conditioning of these prompts, in their order. Raises EmbeddingsError where one is missing."""
        self.require(prompts)
        rows = [self._read_row(*self._row_of[prompt]) for prompt in prompts]
        prompt_embeds, pooled = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
        return Conditioning(prompt_embeds, pooled)

    def _read_row(self, path: Path, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        with safe_open(path, framework="pt") as file:  # mapped, not read: a row costs its own bytes
            return file.get_slice("prompt_embeds")[row : row + 1], file.get_slice("pooled")[row : row + 1]


def _prompts_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            prompts: list[str] = json.loads(file.metadata()["prompts"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EmbeddingsError(
            f"prompts.embeddings_path: {path} is damaged ({error}): delete it, then {_CURE} anew"
        ) from error
    return prompts


def _require_manifest(folder: Path, manifest: Manifest) -> None:
    try:
        found = Manifest(**json.loads((folder / _MANIFEST).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise EmbeddingsError(f"prompts.embeddings_path: {folder / _MANIFEST} cannot be read: {error}") from error
    for name, value in asdict(manifest).items():
        if (other := getattr(found, name)) != value:
            raise EmbeddingsError(
                f"prompts.embeddings_path {folder} was made with {name} {other}, the run has {value}: "
                "give the model and settings that made it, or a new folder"
            )
