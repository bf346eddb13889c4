"""What a worker raises becomes a mistake, which ends a run, or stays an error after which workers start again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.exceptions
import torch
import yaml
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from deploy.settings import ROOT
from services.clients.reward import RewardRejected, RewardUnavailable, RewardUnreachable
from services.config.run import RunConfig
from services.disk import DiskFullError
from services.pictures import read_picture
from trainer.data.prompt_embeddings import Embeddings
from trainer.data.prompt_files import load_prompts
from trainer.model.policy import Policy
from trainer.runtime.failures import EndAtMistakes, mistakes_named
from trainer.runtime.out_of_memory import what_to_lower

TOO_MUCH = 10**15


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def failing_drive(tmp_path: Path) -> Path:
    """A folder of files that exist, but of which each read ends in EIO."""
    for name in ("prompts.txt", "cat.png", "manifest.json", "model_index.json"):
        (tmp_path / name).symlink_to("/proc/self/mem")
    return tmp_path


READERS: dict[str, Callable[[Path], Any]] = {
    "bare": lambda folder: (folder / "prompts.txt").read_bytes(),
    "prompts": lambda folder: load_prompts(folder / "prompts.txt", "prompt"),
    "picture": lambda folder: read_picture(folder / "cat.png"),
    "manifest": lambda folder: Embeddings.open(folder, None),
    "model": lambda folder: Policy.load(str(folder), torch.float32, "cpu"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_drive_that_fails_to_read_may_recover(reader: str, failing_drive: Path) -> None:
    with pytest.raises(OSError, match="Input/output error") as caught, mistakes_named():
        READERS[reader](failing_drive)
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.ETIMEDOUT, "Connection timed out"),
        ConnectionResetError(),
        RewardUnreachable("nothing answers"),
        RewardUnavailable("answered 500: CUDA out of memory"),
        RuntimeError("Connection closed by peer"),
    ],
)
def test_what_may_pass_is_raised_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, mistakes_named():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: Path("/nowhere").read_text(), "FileNotFoundError: .*/nowhere"),
        (lambda: Path("/proc").read_text(), "IsADirectoryError"),
        (lambda: load_prompts(Path("/nowhere.txt"), "prompt"), "PromptsError: .*nowhere.txt: No such file"),
        (raising(PermissionError(errno.EACCES, "Permission denied", "x")), "PermissionError"),
        (raising(DiskFullError("no room to write outputs/x")), "DiskFullError: no room to write outputs/x"),
        (raising(OSError(errno.ENOSPC, "No space left on device")), "No space left"),
        (raising(RewardRejected("too long")), "RewardRejected: too long"),
        (raising(KeyError("a")), "KeyError"),
    ],
)
def test_a_mistake_is_named(act: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text), mistakes_named():
        act()


CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 10.88 GiB is "
    "free. Including non-PyTorch memory, this process has 68.21 GiB memory in use. Of the allocated memory 67.60 GiB "
    "is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


@pytest.mark.parametrize(
    ("act", "numbers"),
    [
        (
            lambda: torch.empty(TOO_MUCH),
            r"tried to allocate 3725290\.30 GiB; the machine has [\d.]+ GiB, [\d.]+ GiB of",
        ),
        (lambda: np.zeros(TOO_MUCH), r"Unable to allocate 7\.11 PiB .*; the machine has"),
        (lambda: bytearray(TOO_MUCH), "an allocation failed; the machine has"),
        (raising(CUDA), r"20\.00 GiB\. GPU 0 has a total capacity of 79\.10 GiB .*67\.60 GiB is allocated by PyTorch"),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")), "ALLOC_FAILED"),
    ],
)
def test_lack_of_memory_is_a_mistake_with_numbers_and_what_to_lower(act: Callable[[], Any], numbers: str) -> None:
    text = rf"^out of memory: .*{numbers}.*: lower this$"
    with pytest.raises(ValueError, match=text) as caught, mistakes_named("lower this"):
        act()
    assert "expandable_segments" not in str(caught.value)


def test_what_to_lower_names_the_keys_that_help_with_their_values() -> None:
    run: dict[str, Any] = yaml.safe_load((ROOT / "deploy/runs/tiny_srpo.yaml").read_text(encoding="utf-8"))
    run["model"] |= {"sizes": [[512, 768], [1024, 1024]]}
    run["evaluation"]["batch"] = 32
    run["engine"] = {"micro_batch": 4, "global_batch": 8, "zero_stage": 1}
    assert what_to_lower(RunConfig.model_validate(run)) == (
        "lower engine.micro_batch 4, model.height_px × width_px 1024 × 1024, evaluation.batch 32; or set "
        "engine.gradient_checkpointing true, model.dtype bfloat16, engine.zero_stage 3 (now 1), finetune.kind lora"
    )
    run["engine"] = {"zero_stage": 3, "gradient_checkpointing": True}
    run["model"]["dtype"] = "bfloat16"
    run["finetune"] = {"kind": "lora"}
    assert what_to_lower(RunConfig.model_validate(run)) == (
        "lower model.height_px × width_px 1024 × 1024, evaluation.batch 32"
    )


def test_a_worker_that_ray_killed_for_its_memory_ends_the_run() -> None:
    killed = ray.exceptions.OutOfMemoryError("1 worker(s) were killed: 7.2GB used / 8GB limit\nRefer to the docs")
    failure = WorkerHealthCheckFailedError("A worker health check failed.", killed)
    text = "^worker 3 failed for good: out of memory: 1 worker.s. were killed: 7.2GB used / 8GB limit: lower this$"
    with pytest.raises(RuntimeError, match=text):
        EndAtMistakes("lower this").after_exception(None, {3: failure})


def test_a_worker_that_died_ends_nothing() -> None:
    died = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())
    EndAtMistakes().after_exception(None, {0: died, 1: OSError(errno.EIO, "Input/output error")})
