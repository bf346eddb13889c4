"""Train on one worker: the whole training loop on one screen.

All workers make the same calls in the same order. Worker 0 records the metrics, averaged over all workers.
"""

from __future__ import annotations

from services.config.run import RunConfig
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.evaluator import Evaluator
from trainer.runtime.worker import Worker


def train_worker(config: RunConfig, run_id: str) -> None:
    """Run one worker's part of a training, as Ray Train calls it on each. launch.py has opened MLflow run `run_id`."""
    worker = Worker(config, run_id)
    checkpoints, evaluator = Checkpoints(worker), Evaluator(worker)
    first_step = checkpoints.resume()
    if first_step == 0:
        worker.warn_of_cut_prompts()
        evaluator.evaluate_base()
        worker.check_guard(step=0)
        checkpoints.keep(step=0)
    for step in range(first_step, config.num_steps):
        if worker.must_stop():
            break
        worker.steer()
        with worker.time_step():
            for group in worker.learner.roll_out(step):
                for material in group:
                    worker.learner.learn(material)
                worker.learner.update()
        worker.record(step + 1)
        worker.check_guard(step + 1)
        checkpoints.keep(step + 1)
        evaluator.show_samples(step + 1)
    evaluator.evaluate_aligned(step=checkpoints.take_best())
    worker.export()
    evaluator.summarize()
