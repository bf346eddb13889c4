"""Save checkpoints, take up a run from its newest whole one, and restore the weights that are the run's result.

All of a step's randomness follows from (seed, step, sample), so a run that goes on from a checkpoint is the same
training, on any number of workers.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from services.clients.checkpoint_store import (
    CheckpointError,
    CheckpointStore,
    Manifest,
    StoredFile,
    checkpoint_location,
)
from services.clients.reward import RewardError
from trainer.model.fragments import open_fragments
from trainer.runtime.agreement import holds_everywhere, text_of_worker_0
from trainer.runtime.checkpoint_writer import CheckpointWriter
from trainer.runtime.stopping import Stopped, StopWatch
from trainer.runtime.worker import Worker


class GivenUpError(ValueError):
    """The run has waited for the reward service for as long as it may; the text is the service's last error."""


class Checkpoints:
    """The checkpoints of a run. All workers call every method, in the same order.

    Between two updates of the policy the state of the last step is whole. So a run that must stop within a step saves
    that state, by `_save_in_step`, and drops the step.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config = worker, worker.config
        self._store = CheckpointStore(checkpoint_location(worker.config, worker.run))
        attempt = text_of_worker_0(secrets.token_hex(3), worker.device)
        place = worker.rank, worker.num_workers
        self._writer = CheckpointWriter(self._store, *place, attempt, self._config.checkpoint.num_kept)
        self._changing = threading.Lock()
        self._step: int | None = None  # whose state the engine holds; None within an update and before the next step
        self._saved_step = -1
        self._watch = StopWatch(worker.run, self._save_in_step)

    def resume(self) -> int:
        """Load the newest checkpoint that is whole. Return the number of steps taken so far, 0 without any."""
        worker = self._worker
        manifests = self._store.manifests() if worker.rank == 0 else []
        if worker.rank == 0:
            self._store.remove_incomplete()
        while (manifest := self._shared(manifests.pop() if manifests else None)) is not None:
            with worker.heartbeat.paused():
                is_taken = self._is_whole(manifest)
                if is_taken:
                    self._load(manifest)
            if is_taken:
                self._step = self._saved_step = manifest.step
                worker.say(f"goes on from step {manifest.step} on {worker.num_workers} workers: {manifest.folder}")
                return manifest.step
        self._step = 0
        return 0

    def keep(self, step: int) -> None:
        """Begin a checkpoint if one is due: as configured, after the last step, and of the guard's best weights so far.

        There is one of step 0 too. It holds what was measured of the base model, but not its weights.
        """
        config, guard = self._config, self._worker.guard
        self._watch.end_step()
        is_due = step % config.checkpoint.every_num_steps == 0 or step == config.num_steps
        is_best = guard is not None and guard.is_best(step)
        is_node_leaving = not holds_everywhere(not self._watch.is_node_leaving, self._worker.device)
        if step != self._saved_step and (is_due or is_best or is_node_leaving):
            self._save(step)

    def leave_if_asked(self, step: int) -> None:
        """Save a checkpoint and raise Stopped, on all workers, if somebody has asked the run to stop."""
        worker = self._worker
        reason = text_of_worker_0(self._watch.reason or "", worker.device)
        if not reason:
            return
        self._watch.end_step()
        if step != self._saved_step:
            self._save(step)
        self._settle()
        if worker.rank == 0:
            worker.run.confirm_stop()
        raise Stopped(reason)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Say within the context that the weights change; the step is then whole again at `reach`."""
        with self._changing:
            self._step = None
            yield

    def reach(self, step: int) -> None:
        """Say that the engine holds the state after `step` steps, and that they are recorded."""
        with self._changing:
            self._step = step

    def give_up(self, error: RewardError) -> NoReturn:
        """Have all workers save the last step's state, within a step, and raise GivenUpError, which ends the run."""
        self._worker.run.request_stop("the reward service does not answer")
        self._watch.wait_until_saved()
        raise GivenUpError(str(error)) from error

    def take_best(self) -> int:
        """Restore the weights that are the run's result. Return their step, and record why it is this one."""
        worker, guard = self._worker, self._worker.guard
        self._settle()
        if guard is None:
            return self._config.num_steps
        step, reason = guard.exported_step, guard.broken_rule
        with self._changing:
            self._step = None  # from here on the engine holds the result, from which no training goes on
        if reason is not None:
            worker.log(lambda record: record.set_tag("stopped_by", reason))
        worker.log(lambda record: record.set_tag("exported_step", str(step)))
        worker.say(f"guard: {reason or 'no rule was broken'}; the result is step {step}'s")
        with worker.heartbeat.paused():
            if step == 0:
                worker.take_base()
            elif step != guard.last_step:
                self._take_weights(step)
        return step

    def close(self) -> None:
        """Stop watching for a stop. What is being written is complete after `take_best` and `leave_if_asked`."""
        self._watch.close()

    def _save(self, step: int) -> None:
        worker = self._worker
        with worker.seconds.timed("checkpoints"):
            self._settle()
            part = worker.engine.snapshot() if step > 0 else None
            self._writer.write(part, self._facts(step), self._best_step())
        self._saved_step = step

    def _settle(self) -> None:
        with self._worker.heartbeat.paused():  # where storage is slow, it may take long
            self._writer.settle(partial(holds_everywhere, device=self._worker.device))

    def _save_in_step(self, timeout_s: float) -> None:
        """Save the last whole state, in a thread of its own, while a step goes on that will be dropped."""
        with self._changing:
            step = self._step
            part = None
            if step is not None and step not in (0, self._saved_step):
                part, facts = self._worker.engine.snapshot(), self._facts(step)
        if part is not None:
            self._writer.write_alone(part, facts, self._best_step(), timeout_s)
        if self._worker.rank == 0 and self._watch.reason is not None:
            self._worker.run.confirm_stop()

    def _best_step(self) -> int | None:
        guard = self._worker.guard
        return guard.best_step if guard is not None else None

    def _facts(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint's manifest says beside its files, and all state that is not in them."""
        worker, guard = self._worker, self._worker.guard
        return {
            "step": step,
            "time": time.time(),
            "num_workers": worker.num_workers,
            "is_best": guard is not None and guard.best_step == step,
            "numbers": dict(worker.last_numbers),
            "steering": worker.steering.in_force.to_tag(),
            "guard": guard.state() if guard is not None else None,
            "versions": worker.run.record().get("versions", {}),
            "config": self._config.model_dump(mode="json"),
        }

    def _load(self, manifest: Manifest) -> None:
        worker, facts = self._worker, manifest.facts
        worker.steering.restore(facts["steering"])
        if worker.guard is not None and facts["guard"] is not None:
            worker.guard.restore(facts["guard"])
        if manifest.files:
            worker.engine.load(self._store.files(manifest))

    def _is_whole(self, manifest: Manifest) -> bool:
        """Let each worker read some of the files, and return on all whether all are as they were written."""
        worker = self._worker
        names = [file.name for file in manifest.files][worker.rank :: worker.num_workers]
        damage = self._store.damage(manifest, names)
        if damage is not None:
            print(f"warning: checkpoint {manifest.folder} is damaged: {damage}; the one before is taken", flush=True)
        return holds_everywhere(damage is None, worker.device)

    def _shared(self, manifest: Manifest | None) -> Manifest | None:
        """Return worker 0's manifest on all workers."""
        text = text_of_worker_0(json.dumps(asdict(manifest)) if manifest else "", self._worker.device)
        if not text:
            return None
        tree: Mapping[str, Any] = json.loads(text)
        return Manifest(tree["folder"], tuple(StoredFile(**each) for each in tree["files"]), tree["facts"])

    def _take_weights(self, step: int) -> None:
        found = [each for each in self._store.manifests() if each.step == step]
        if not found:
            raise CheckpointError(f"{self._store.location} has no checkpoint of step {step}, the best one")
        with open_fragments(self._store.files(found[-1])) as state:
            self._worker.engine.replace_weights(state.weight)
