"""`srpo encode-prompts RUN.yaml`: encode a run's prompts by Ray Data before it trains, so that no worker holds T5.

`python -m trainer.jobs.encode_prompts`, as a Ray job or in the foreground. Prompts that prompts.embeddings_path has
are not encoded again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.data.conditioning import manifest_of
from trainer.data.prompt_embeddings import Embeddings, prepare, write_shard
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.data.run_prompts import used_prompts
from trainer.jobs.encoding import EncodeError, Write, encode_shards
from trainer.model.loading import check_model_path, load_text_encoders, model_folder
from trainer.runtime.cluster import ClusterError, check_cluster, connect
from trainer.runtime.paths import with_absolute_paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 with a line on stderr."""
    parser = argparse.ArgumentParser(
        prog="srpo encode-prompts", description="Encode a run's prompts into its embeddings_path."
    )
    parser.add_argument("run_file", type=Path)
    run_file: Path = parser.parse_args(arguments).run_file
    try:
        config = with_absolute_paths(load_run_config(run_file))
        folder = config.prompts.embeddings_path
        if folder is None:
            raise EncodeError(f"{run_file}: prompts.embeddings_path is not set: name the folder to write to")
        encode(config, folder)
    except (ConfigError, EncodeError, ClusterError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done: {folder}")
    return 0


def encode(config: RunConfig, folder: Path) -> None:
    """Encode every prompt that the run uses and `folder` lacks. Raise EncodeError, ModelError, PromptsError and others.

    All that can be wrong with the run is checked before the cluster is joined.
    """
    check_model_path(config.model.path)
    prompts = used_prompts(config)
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    source = model_folder(config.model.path)
    manifest = manifest_of(config, source)
    prepare(folder, manifest)
    missing = Embeddings.open(folder, manifest).missing(each.prompt for each in prompts)
    print(f"{len(prompts)} prompts, {len(prompts) - len(missing)} of them encoded before", flush=True)
    text = load_text_encoders(str(source), torch.float32, only_tokenizers=True)
    if cut := describe_cut_prompts(text, prompts, config.model.max_sequence_length):
        print(f"warning: {cut}", flush=True)
    if missing:
        size = config.prompts.shard_prompts
        shards = [missing[start : start + size] for start in range(0, len(missing), size)]
        try:
            connect(config, num_workers=1)
            encode_shards(config, source, shards, prompt_encoder, len(missing), "prompts")
        finally:
            ray.shutdown()


def prompt_encoder(config: RunConfig, source: Path) -> Write:
    """Load the text encoders of `source`; return a function that encodes and writes a shard, a list of prompts."""
    device = "cuda" if config.engine.use_gpu else "cpu"
    text = load_text_encoders(str(source), getattr(torch, config.text_encoder_dtype), device)
    folder = config.prompts.embeddings_path
    assert folder is not None

    def write(prompts: list[str]) -> int:
        write_shard(folder, prompts, text.encode_prompts(prompts, config.model.max_sequence_length))
        return len(prompts)

    return write


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Ray's processes end with this one
    sys.exit(main())
