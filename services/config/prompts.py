"""Where a run's prompts come from, as keys of its file: files, the HPDv2 benchmark, and embeddings made before."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from services.config.objective import Frozen, Positive, Word

# hpsv2's benchmark: 800 prompts of a style, or all 3,200. hpsv2 fetches them from the hub once and keeps them.
Benchmark = Literal["hpdv2:all", "hpdv2:anime", "hpdv2:concept-art", "hpdv2:paintings", "hpdv2:photo"]
# .txt (one prompt a line), .jsonl (an object a line), .parquet
PromptsPath = Path | Benchmark


class PromptsConfig(Frozen):
    path: PromptsPath | None = None  # what is rolled out; or else `dataset`, real images
    column: Word = "prompt"  # the text in .jsonl and .parquet files, here, in evaluation and in guard
    # Folder that `srpo embed` fills and training reads, in place of loading the text encoders. None: the run encodes.
    embeddings_path: Path | None = None
    shard_prompts: Positive = 64  # prompts a file there; one of FLUX.1-dev in bfloat16 takes 4 MiB


def absolute(path: PromptsPath) -> PromptsPath:
    """A file's path without regard to the current folder; the benchmark has none."""
    return path.resolve() if isinstance(path, Path) else path
