"""`srpo encode-prompts RUN.yaml`: encode a run's prompts by Ray Data before it trains, so that no worker holds T5.

`python -m trainer.jobs.encode_prompts`, as a Ray job or in the foreground. What prompts.embeddings_path has is not
encoded again, so that a job that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.data.conditioning import manifest_of, used_prompts
from trainer.data.prompt_embeddings import Embeddings, prepare, write_shard
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.launch import LaunchError, check_cluster, connect, with_absolute_paths, worker_environment
from trainer.model.loading import check_model_path, load_text_encoders, model_folder

logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plans, and that progress bars are off


class EmbedError(RuntimeError):
    """The embeddings could not be made; the text names the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with a line on stderr."""
    parser = argparse.ArgumentParser(
        prog="srpo encode-prompts", description="Encode a run's prompts into its embeddings_path."
    )
    parser.add_argument("run_file", type=Path)
    run_file: Path = parser.parse_args(arguments).run_file
    try:
        config = with_absolute_paths(load_run_config(run_file))
        folder = config.prompts.embeddings_path
        if folder is None:
            raise EmbedError(f"{run_file}: prompts.embeddings_path is not set: name the folder to write to")
        embed(config, folder)
    except (ConfigError, EmbedError, LaunchError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done: {folder}")
    return 0


def embed(config: RunConfig, folder: Path) -> None:
    """Bring `folder` up to every prompt that the run uses. Raises what load, files and encoders raise, by name."""
    check_model_path(config.model.path)
    prompts = used_prompts(config)
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    source = model_folder(config.model.path)
    manifest = manifest_of(config, source)
    prepare(folder, manifest)
    missing = Embeddings.open(folder, manifest).missing(each.prompt for each in prompts)
    print(f"{len(prompts)} prompts, {len(prompts) - len(missing)} of them embedded before", flush=True)
    text = load_text_encoders(str(source), torch.float32, only_tokenizers=True)
    if cut := describe_cut_prompts(text, prompts, config.model.max_sequence_length):
        print(f"warning: {cut}", flush=True)
    if missing:
        connect(config)
        try:
            encode_on_ray(config, source, folder, missing)
        finally:
            ray.shutdown()


def encode_on_ray(config: RunConfig, source: Path, folder: Path, prompts: Sequence[str]) -> None:
    """A Ray Data pipeline: shards of prompts, through as many actors as the run has workers, into files."""
    context, engine, size = ray.data.DataContext.get_current(), config.engine, config.prompts.shard_prompts
    context.enable_progress_bars = False  # a job's log cannot show them
    shards = [{"prompts": prompts[start : start + size]} for start in range(0, len(prompts), size)]
    written = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        ShardEncoder,
        fn_constructor_args=(config.model_dump_json(), str(source), str(folder)),
        batch_size=1,
        batch_format="pandas",  # the prompts of a shard stay a list
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(engine.num_workers, len(shards))),
        num_cpus=engine.cpus_per_worker,
        num_gpus=int(engine.use_gpu),
        runtime_env={"env_vars": worker_environment(config)},
    )
    started, done = time.perf_counter(), 0
    try:
        for row in written.iter_rows():
            done += int(row["num_prompts"])
            print(progress_line(done, len(prompts), time.perf_counter() - started), flush=True)
    except ray.exceptions.RayError as error:
        raise EmbedError(
            f"{len(prompts) - done} prompts are not embedded: {str(error).strip().splitlines()[-1]}"
        ) from error


class ShardEncoder:
    """The actor: a model's text encoders, loaded once, and the folder that it writes shards to."""

    def __init__(self, config: str, source: str, folder: str) -> None:
        self._config, self._folder = RunConfig.model_validate_json(config), Path(folder)
        torch.set_num_threads(self._config.engine.threads_per_worker)  # as in training, whose numbers these are
        device = "cuda" if self._config.engine.use_gpu else "cpu"
        self._text = load_text_encoders(source, getattr(torch, self._config.model.dtype), device)

    def __call__(self, shards: Any) -> Any:
        """Shards of prompts in a data frame -> the number of prompts written of each."""
        for prompts in shards["prompts"]:
            conditioning = self._text.encode_prompts(list(prompts), self._config.model.max_sequence_length)
            write_shard(self._folder, list(prompts), conditioning)
        return {"num_prompts": [len(prompts) for prompts in shards["prompts"]]}


def progress_line(num_done: int, num_prompts: int, seconds: float) -> str:
    """
    >>> progress_line(256, 1024, 20.0)
    'embedded 256/1024 prompts  12.8 prompts/s  ETA 1:00'
    """
    minutes, left_s = divmod(round(seconds * (num_prompts - num_done) / num_done), 60)
    return f"embedded {num_done}/{num_prompts} prompts  {num_done / seconds:.1f} prompts/s  ETA {minutes}:{left_s:02d}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Ray's processes end with this one
    sys.exit(main())
