"""The section `prompts` of a run file: prompt files, the HPDv2 benchmark, and embeddings that were made before."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from services.config.fields import Frozen, Positive, Word

# hpsv2's benchmark: 800 prompts of a style, or all 3,200. hpsv2 fetches them from the hub once and keeps them.
Benchmark = Literal["hpdv2:all", "hpdv2:anime", "hpdv2:concept-art", "hpdv2:paintings", "hpdv2:photo"]
PromptsPath = Path | Benchmark


class PromptsConfig(Frozen):
    """The training prompts. Prompts that the text encoders cut are counted in one warning, also on the MLflow run."""

    path: PromptsPath | None = None
    """What is rolled out: a .txt file (one prompt a line), .jsonl (an object a line) or .parquet, or a part of HPDv2's
    benchmark through hpsv2 (800 prompts of a style, or all 3,200; fetched from the hub once). null: the run has a
    `dataset` instead."""

    column: Word = "prompt"
    """The text's column in .jsonl and .parquet files, here, in `evaluation` and in `guard`."""

    embeddings_path: Path | None = None
    """The folder that `srpo encode-prompts` fills and training reads, a step's prompts at a time, in place of loading
    the text encoders: the same numbers to the last bit on the same kind of device. null: the run encodes them
    itself."""

    shard_prompts: Positive = 64
    """The number of prompts in a file of that folder. One of FLUX.1-dev in bfloat16 takes 4 MiB."""


def absolute(path: PromptsPath) -> PromptsPath:
    """Return a file's path without regard to the current folder; the benchmark's name stays as it is."""
    return path.resolve() if isinstance(path, Path) else path
