"""Faults of processes and nodes: what is done to a training, from its start to its end.

Each function starts the training, disturbs it on the way, takes it up again where a person would, and waits for its
end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from deploy.faults.stage import NODE_IP, Stage
from deploy.faults.training import FaultError, Training, kill, until
from services.clients.checkpoint_store import CheckpointStore, checkpoint_location

NOTICE_S = 20
_NUM_KILLS, _KILLS_SEED, _KILL_WITHIN_S, _STEP_S = 20, 0, 15.0, 3.0


def kill_a_worker(_: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(6)
    training.workers()[-1].kill()
    training.finish()


def kill_all_workers(_: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(6)
    for worker in training.workers():
        worker.kill()
    training.finish()


def kill_the_driver(_: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(6)
    training.launcher.kill()
    training.wait()
    training.take_up()


def kill_the_driver_in_a_checkpoint(_: Stage, training: Training) -> None:
    """Kill everything while a checkpoint has one of its two files."""
    training.start()
    training.wait_for_step(4)
    folder = training.folder.path / "checkpoints"
    until(lambda: any(len(list(each.glob("*.part.json"))) == 1 for each in folder.glob("step_00000004_*")))
    processes = [training.launcher, *training.workers()]
    for process in processes:
        process.kill()
    training.wait()
    training.take_up()


def kill_the_head(stage: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(6)
    for process in stage.services.ray.members():
        kill(process)
    training.wait()
    stage.restart_ray()
    training.take_up()


def kill_a_node(stage: Stage, training: Training) -> None:
    """The node of one of two workers goes and does not come back: the run shrinks."""
    stage.start_node(num_cpus=3)
    training.start()
    training.wait_for_step(6)
    for process in stage.node.members():
        kill(process)
    training.finish()
    stage.node.stop()


def grow(stage: Stage, training: Training) -> None:
    """A second node comes while one worker trains."""
    training.start()
    training.wait_for_step(2)
    stage.start_node(num_cpus=3)
    training.finish()
    stage.node.stop()


def drain_a_node(stage: Stage, training: Training) -> None:
    """A preemption notice, then the node goes."""
    stage.start_node(num_cpus=3)
    training.start()
    training.wait_for_step(6)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={stage.ray_address}"),
        *(f"--node-id={_second_node(stage)}", "--reason=DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message=spot", f"--deadline-remaining-seconds={NOTICE_S}"),
    ]
    subprocess.run(command, env=os.environ | stage.environment(), check=True, capture_output=True, timeout=60)
    time.sleep(NOTICE_S)
    for process in stage.node.members():
        kill(process)
    training.finish()
    stage.node.stop()


def freeze_a_worker(_: Stage, training: Training) -> None:
    """A worker hangs without dying."""
    training.start()
    training.wait_for_step(6)
    training.workers()[-1].send_signal(signal.SIGSTOP)
    training.finish()


def kill_at_random(_: Stage, training: Training) -> None:
    """Kill driver, one worker or all at twenty random moments, and take the run up each time the driver died.

    About half of the moments are within a start, the others one or two steps later.
    """
    random, done = Random(_KILLS_SEED), 0
    training.start()
    for number in range(_NUM_KILLS):
        began = time.monotonic()
        victim = random.choice(("driver", "worker", "workers"))
        until(lambda: bool(training.workers()), timeout_s=120)
        if random.random() < 0.5:
            time.sleep(random.uniform(0, _KILL_WITHIN_S))
        else:
            training.wait_for_step(done + random.randint(2, 3))  # it is under way: one or two are new
            time.sleep(random.uniform(0, _STEP_S))
        victims = {"driver": lambda: [training.launcher], "worker": lambda: training.workers()[:1]}
        for process in victims.get(victim, training.workers)():
            kill(process)
        if victim == "driver" or training.is_over:
            training.wait()
            training.start("--resume")
        done = max(training.steps_printed(), default=0)
        print(f"kill {number + 1}: {victim}, after {time.monotonic() - began:.0f} s; {done} steps are done", flush=True)
    training.finish()


def stop_by(number: signal.Signals) -> Callable[[Stage, Training], None]:
    """Return the fault of a signal to the launcher, after which the run is taken up."""

    def act(_: Stage, training: Training) -> None:
        training.start()
        training.wait_for_step(4)
        began = time.monotonic()
        training.launcher.send_signal(number)
        code = training.wait()
        seconds = time.monotonic() - began
        if code != 130 or seconds > 30:
            raise FaultError(f"exit code {code} after {seconds:.0f} s; {training.last_words()}")
        if left := training.workers():
            raise FaultError(f"processes are left: {left}")
        training.take_up()

    return act


def damage_the_newest_checkpoint(_: Stage, training: Training) -> None:
    training.start()
    training.wait_for_step(7)
    training.launcher.kill()
    training.wait()
    newest = Path(CheckpointStore(checkpoint_location(training.config, training.folder)).manifests()[-1].folder)
    file = newest / "policy_0.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    training.take_up()


def _second_node(stage: Stage) -> str:
    """Return the id of the second node, which Ray knows under its address."""
    program = "import ray; ray.init(logging_level='ERROR'); print(*(n['NodeID'] for n in ray.nodes() if n['Alive'] and "
    program += f"n['NodeManagerAddress'] == '{NODE_IP}'))"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(
        command, env=os.environ | stage.environment(), check=True, capture_output=True, text=True, timeout=60
    )
    return answer.stdout.split()[-1]
