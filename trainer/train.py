"""Train on one worker: the whole training loop on one screen.

All workers make the same calls in the same order. Worker 0 records the metrics, averaged over all workers.
"""

from __future__ import annotations

from services.clients.reward_exchange import RewardUnavailable, RewardUnreachable
from services.clients.run_folder import RunFolder
from services.config.run import RunConfig
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.evaluator import Evaluator
from trainer.runtime.stopping import Stopped
from trainer.runtime.worker import Worker


def train_worker(config: RunConfig, run: RunFolder) -> None:
    """Run one worker's part of a training, as Ray Train calls it on each; go on from a checkpoint if there is one."""
    worker = Worker(config, run)
    checkpoints, evaluator = Checkpoints(worker), Evaluator(worker)
    try:
        _train(worker, checkpoints, evaluator)
    except Stopped as stopped:
        worker.say(f"stopped: {stopped}")
    except (RewardUnreachable, RewardUnavailable) as error:
        checkpoints.give_up(error)
    finally:
        checkpoints.close()
        worker.close()


def _train(worker: Worker, checkpoints: Checkpoints, evaluator: Evaluator) -> None:
    step = checkpoints.resume()
    worker.warn_of_cut_prompts()
    evaluator.evaluate_base()
    while True:
        worker.check_guard(step)
        evaluator.show_samples(step)
        checkpoints.keep(step)
        if step == worker.config.num_steps or worker.must_end():
            break
        checkpoints.leave_if_asked(step)
        worker.steer(step)
        with worker.time_step():
            for group in worker.learner.roll_out(step):
                for material in group:
                    worker.learner.learn(material)
                with checkpoints.updating():
                    worker.learner.update()
        step += 1
        worker.record(step)
        checkpoints.reach(step)
    evaluator.evaluate_aligned(step=checkpoints.take_best())
    worker.export()
    evaluator.summarize()
