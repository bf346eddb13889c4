"""Faults of what a training speaks to: reward service, MLflow, disks. Functions as in processes.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from deploy.faults.stage import Stage
from deploy.faults.training import FaultError, Training, kill


def kill_a_reward_replica(stage: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(4)
    replicas = [each for each in stage.processes() if any("ServeReplica" in part for part in _command(each))]
    if not replicas:
        raise FaultError("no replica was found")
    for replica in replicas:
        kill(replica)
    training.finish()


def take_the_reward_service_away(stage: Stage, training: Training) -> None:
    """For 45 s nothing answers."""
    training.start()
    training.wait_for_step(4)
    stage.proxy.is_away = True
    time.sleep(45)
    stage.proxy.is_away = False
    training.finish()


def take_the_reward_service_away_for_good(stage: Stage, training: Training) -> None:
    """Longer than reward_service.patience_minutes: the run gives up, and is taken up when the service is back."""
    training.start()
    training.wait_for_step(4)
    stage.proxy.is_away = True
    try:
        training.wait()
    finally:
        stage.proxy.is_away = False
    training.take_up()


def kill_mlflow(stage: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(3)
    for process in stage.mlflow.members():
        kill(process)
    training.wait_for_step(7)
    stage.restart_mlflow()
    training.finish()


def mlflow_absent_at_the_start_and_for_good(stage: Stage, training: Training) -> None:
    """MLflow is away for the whole run; `srpo sync` delivers it later."""
    stage.services.down([stage.mlflow])
    try:
        training.start()
        training.finish()
    finally:
        stage.restart_mlflow()
    command = [sys.executable, "-m", "services.commands.main", "sync", str(training.folder.path)]
    synced = subprocess.run(
        command, env=os.environ | stage.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    training.lines += synced.stdout.splitlines(keepends=True)
    if synced.returncode:
        raise FaultError(f"srpo sync: {synced.stdout}{synced.stderr}")


def freeze_mlflow(stage: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(3)
    frozen = stage.mlflow.members()
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        training.wait_for_step(8)
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    training.finish()


def fill_the_disk_of_checkpoints(stage: Stage, training: Training) -> None:
    """The checkpoints' disk has room for one and a half."""
    disk = stage.folder / "disk"
    with _small_disk(disk, mib=170):
        training.start("--set", f"checkpoint.storage={disk}")
        training.finish()


def fill_the_spool(stage: Stage, training: Training) -> None:
    """MLflow is away, and the spool is at its limit before the run's end: pictures are left out, no number is."""
    stage.services.down([stage.mlflow])
    try:
        training.start()
        training.wait_for_step(8)
    finally:
        stage.restart_mlflow()
    training.finish()


def spoil_a_gradient(stage: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(4)
    stage.proxy.spoil_next_gradient()
    training.finish()


@contextmanager
def _small_disk(path: Path, mib: int) -> Iterator[None]:
    """Let `path` be a disk of its own of some MiB within the context. Only root may mount one."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
