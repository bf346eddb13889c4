"""Choose the learner of a run's method. A new training method gets a learner class and a line in each function here.

learner = make_learner(config, engine, policy, score, encode)
"""

from __future__ import annotations

from typing import Any

from services.config.method import DirectAlignMethod, DraftLvMethod, GrpoMethod
from services.config.run import RunConfig
from trainer.algorithm.baselines import DraftLvLearner, GrpoLearner, ReflLearner
from trainer.algorithm.direct_align_learner import DirectAlignLearner
from trainer.algorithm.learner import Learner
from trainer.algorithm.reward_loss import Score
from trainer.data.conditioning import Encode
from trainer.model.engine import Engine
from trainer.model.policy import Policy


def make_learner(config: RunConfig, engine: Engine, policy: Policy, score: Score, encode: Encode) -> Learner[Any]:
    """Return the learner of the run's method."""
    kinds: dict[str, type[Learner[Any]]] = {
        "direct_align": DirectAlignLearner,
        "refl": ReflLearner,
        "draft_lv": DraftLvLearner,
        "grpo": GrpoLearner,
    }
    return kinds[config.method.kind](config, engine, policy, score, encode)


def num_backwards(config: RunConfig, num_workers: int) -> int:
    """Return how often each of `num_workers` workers runs backward between two updates of the policy."""
    method, objective, each = config.method, config.objective, 1
    if isinstance(method, DirectAlignMethod):
        each = len(objective.branches) * (1 if objective.update_per_injection else objective.num_injections)
    elif isinstance(method, DraftLvMethod):
        each = method.num_renoisings
    elif isinstance(method, GrpoMethod):
        each = method.num_trained_steps // method.num_updates
    return each * config.engine.num_micro_batches(num_workers)
