"""Save checkpoints, resume from the last one, and restore the weights that are the run's result."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ray.train

from trainer.evaluation.stop_rules import BEST_STEP
from trainer.runtime.worker import Worker


class Checkpoints:
    """The checkpoints of a run, which Ray Train keeps. All workers call every method, in the same order."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config = worker, worker.config

    def resume(self) -> int:
        """Load the last checkpoint if Ray Train has restarted the workers. Return the number of steps taken so far."""
        worker, checkpoint = self._worker, ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            worker.steering.load(Path(folder))
            if worker.guard is not None:
                worker.guard.load(Path(folder))
            return worker.engine.load(Path(folder))

    def keep(self, step: int) -> None:
        """Save at the configured steps, after the last step, and if the guard has found the best weights so far.

        With a guard the base model's weights are saved too: they are the result if no check is better.
        """
        config, guard = self._config, self._worker.guard
        is_due = step > 0 and (step % config.checkpoint.every_num_steps == 0 or step == config.num_steps)
        is_base = step == 0 and guard is not None
        if is_due or is_base or (guard is not None and guard.is_best(step)):
            self._save(step)

    def take_best(self) -> int:
        """Restore the weights that are the run's result. Return their step, and record why it is this one."""
        worker, guard = self._worker, self._worker.guard
        if guard is None:
            return self._config.num_steps
        step, reason = guard.exported_step, guard.broken_rule
        if reason is not None:
            worker.log(lambda tracker: tracker.set_tag("stopped_by", reason))
        worker.log(lambda tracker: tracker.set_tag("exported_step", str(step)))
        if worker.is_recording:
            print(f"guard: {reason or 'no rule was broken'}; the result is step {step}'s", flush=True)
        if step != guard.last_step:
            kept = {each.metrics["step"]: each.checkpoint for each in ray.train.get_all_reported_checkpoints()}
            with kept[step].as_directory() as folder:
                worker.engine.load(Path(folder))
        return step

    def _save(self, step: int) -> None:
        worker, guard, metrics = self._worker, self._worker.guard, {"step": step}
        with tempfile.TemporaryDirectory() as folder, worker.seconds.timed("checkpoints"):
            worker.engine.save(Path(folder), step)
            if guard is not None:
                metrics[BEST_STEP] = step if guard.is_best(step) else -1
            if worker.rank == 0:
                worker.steering.save(Path(folder))
                if guard is not None:
                    guard.save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
