"""The matrix: a row for every fault, with what a user must have read and what it may cost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.faults import processes, services
from deploy.faults.stage import Stage
from deploy.faults.training import Training


@dataclass(frozen=True)
class Fault:
    """A row. `act` starts the training, disturbs it and waits for its end.

    says: parts of lines that must be printed. max_repeated: steps that may be done twice. same_weights: whether the
    result must be that of the undisturbed training.
    """

    name: str
    act: Callable[[Stage, Training], None]
    says: tuple[str, ...] = ()
    max_repeated: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    same_weights: bool = True


_RESUMED = ("goes on from step",)
_STOPPED = ("the run saves a checkpoint and stops", "go on with: srpo run")
_LONG = {"num_steps": 30}
# A node of 4 CPUs, the head's, has room for one such worker beside the reward service.
_ELASTIC = {"engine": {"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": 3.0}}
_IMPATIENT = {"reward_service": {"patience_minutes": 0.5}}
_KILLED = {"checkpoint": {"max_failures": 100}}

_MANY_PICTURES = {
    "tracking": {"spool_mib": 1},
    "evaluation": {"prompts_path": "deploy/tiny/prompts/test.txt", "num_grid_images": 32, "every_num_steps": 1},
}

FAULTS = (
    Fault("killed: a worker", processes.kill_a_worker, _RESUMED, 2),
    Fault("killed: all workers", processes.kill_all_workers, _RESUMED, 2),
    Fault("killed: the driver", processes.kill_the_driver, _RESUMED, 2),
    Fault("killed: all, between a checkpoint's files", processes.kill_the_driver_in_a_checkpoint, _RESUMED, 4),
    Fault("killed: the head", processes.kill_the_head, _RESUMED, 2),
    Fault("killed: a node, and the run shrinks", processes.kill_a_node, ("on 1 workers",), 2, _ELASTIC),
    Fault("a node comes, and the run grows", processes.grow, ("to go on with 2 workers",), 0, _ELASTIC | _LONG),
    Fault("a preemption notice for a node", processes.drain_a_node, ("on 1 workers",), 1, _ELASTIC | _LONG),
    Fault("killed: the reward replica", services.kill_a_reward_replica),
    Fault("reward service away for 45 s", services.take_the_reward_service_away, ("has not answered", "answers again")),
    Fault("reward service away for good", services.take_the_reward_service_away_for_good, _STOPPED[1:], 1, _IMPATIENT),
    Fault("killed: MLflow", services.kill_mlflow, ("does not answer",)),
    Fault("MLflow away for the whole run", services.mlflow_absent_at_the_start_and_for_good, ("srpo sync",)),
    Fault("frozen: MLflow", services.freeze_mlflow),
    Fault("frozen: a worker", processes.freeze_a_worker, _RESUMED, 2),
    Fault("full disk: checkpoints", services.fill_the_disk_of_checkpoints, ("No space left on device",)),
    Fault("full spool", services.fill_the_spool, ("are left out of the record",), 0, _MANY_PICTURES),
    Fault("SIGTERM", processes.stop_by(signal.SIGTERM), _STOPPED),
    Fault("Ctrl-C", processes.stop_by(signal.SIGINT), _STOPPED),
    Fault("damaged checkpoint", processes.damage_the_newest_checkpoint, ("has other contents than", *_RESUMED), 4),
    Fault("non-finite gradient", services.spoil_a_gradient, ("skipped",), same_weights=False),
    Fault("twenty kills at random moments", processes.kill_at_random, _RESUMED, 80, _LONG | _KILLED),
)
