"""Encode shards by Ray Data with as many actors as the run has workers, and print lines of progress.

    encode_shards(config, source, shards, load=prompt_encoder, total=1024, noun="prompts")

Both `srpo encode-prompts` and `srpo encode-images` end here. A job that is stopped leaves whole shards only, and the
next one makes those that are missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch

from services.config.run import RunConfig
from trainer.runtime.cluster import worker_environment
from trainer.runtime.resources import worker_resources

_PROGRESS_EVERY_S = 5.0

Write = Callable[[Any], int]  # encode and write a shard, given as JSON's types; return its number of items
Load = Callable[[RunConfig, Path], Write]  # from the run and the model's folder


class EncodeError(RuntimeError):
    """Something could not be encoded; the text says how much is missing, and the cause."""


def encode_shards(config: RunConfig, source: Path, shards: Sequence[Any], load: Load, total: int, noun: str) -> None:
    """Give every shard to an actor's `load(config, source)`. Raise EncodeError if one fails.

    `total` is the number of items in all shards, `noun` what an item is called.
    """
    quiet_ray_data()
    engine = config.engine
    rows = [{"shard": json.dumps(shard)} for shard in shards]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardEncoder,
        fn_constructor_args=(config.model_dump_json(), source, load),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(engine.max_workers, len(rows))),
        num_cpus=engine.cpus_per_worker,
        num_gpus=int(engine.use_gpu),
        memory=worker_resources(engine).get("memory"),
        runtime_env={"env_vars": worker_environment(config)},
    )
    done = 0
    try:
        for row in with_progress(written, "encoded", total, noun):
            done += row["num_items"]
    except ray.exceptions.RayError as error:
        raise EncodeError(f"{total - done} {noun} are not encoded: {str(error).strip().splitlines()[-1]}") from error


class ShardEncoder:
    """An actor of Ray Data: a model's encoder, loaded once, and what writes a shard with it."""

    def __init__(self, config: str, source: Path, load: Load) -> None:
        run = RunConfig.model_validate_json(config)
        torch.set_num_threads(run.engine.threads_per_worker)  # as in training, whose numbers these are
        self._write = load(run, source)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"num_items": self._write(json.loads(row["shard"]))}


def with_progress(rows: ray.data.Dataset, verb: str, total: int, noun: str) -> Iterator[Any]:
    """Yield the rows as they come; every few seconds print how many items are done. A row may count `num_items`."""
    started = printed_at = time.monotonic()
    done = 0
    for row in rows.iter_rows():
        done += row.get("num_items", 1)
        now = time.monotonic()
        if now - printed_at > _PROGRESS_EVERY_S or done == total:
            printed_at = now
            print(progress_line(verb, done, total, noun, now - started), flush=True)
        yield row


def progress_line(verb: str, num_done: int, total: int, noun: str, seconds: float) -> str:
    """
    >>> progress_line("encoded", 256, 1024, "prompts", 20.0)
    'encoded 256/1024 prompts  12.8 prompts/s  ETA 1:00'
    """
    minutes, left_s = divmod(round(seconds * (total - num_done) / num_done), 60)
    return f"{verb} {num_done}/{total} {noun}  {num_done / seconds:.1f} {noun}/s  ETA {minutes}:{left_s:02d}"


def quiet_ray_data() -> None:
    """Turn off what Ray Data draws for terminals: a job's log has the lines of `with_progress`."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
