"""Turn a plan into seconds: FLOPs, bytes in memory and bytes between GPUs by phase, and the hours of the run. Pure.

A phase takes the longer of its arithmetic, at a share (MFU) of the accelerator's peak, and its memory traffic, at a
share of the memory's speed; what travels between GPUs is added, as DeepSpeed overlaps little of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from trainer.plan.accelerators import Accelerator
from trainer.plan.phases import Played, play_decoding, play_forward
from trainer.plan.plan import Plan
from trainer.plan.reward import TOWERS, tower_flops
from trainer.plan.tape import FLOAT32_BYTES

DEFAULT_MFU = 0.4  # of bfloat16 without compile; what is assumed is printed
_MEMORY_SHARE = 0.7  # of the data sheet's speed, as copies reach it
_REWARD_BYTES = 1e9  # per second of one worker's exchange: HTTP, no pickle, one copy on each side
_OPTIMIZER_PASSES = 7  # of AdamW over its float32 numbers: reads w, g, m, v; writes w, m, v


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What a phase costs one worker in a step (or in the whole run, if is_of_run)."""

    name: str
    flops: float
    moved_bytes: float
    link_bytes: float
    seconds: float
    is_of_run: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """The phases, the seconds of a step and the hours of the whole run, of all GPUs that train together."""

    phases: tuple[PhaseCost, ...]
    num_steps: int
    num_workers: int

    @property
    def step_seconds(self) -> float:
        return sum(each.seconds for each in self.phases if not each.is_of_run)

    @property
    def run_hours(self) -> float:
        once = sum(each.seconds for each in self.phases if each.is_of_run)
        return (self.step_seconds * self.num_steps + once) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.run_hours * self.num_workers


class Clock:
    """Makes phases of what was played, on one accelerator."""

    def __init__(self, plan: Plan, accelerator: Accelerator, mfu: float) -> None:
        self._accelerator, self._mfu = accelerator, mfu
        self._spans = plan.run.num_workers > plan.run.gpus_per_host
        self._itemsize = plan.run.itemsize

    def phase(
        self, name: str, played: Played, count: float, *, link_bytes: float = 0, of_run: bool = False
    ) -> PhaseCost:
        """Return a phase that is played `count` times; link_bytes is of one time."""
        seconds = self._computing(played.flops, played.moved_bytes) + self._travelling(link_bytes)
        amounts = (played.flops * count, played.moved_bytes * count, link_bytes * count)
        return PhaseCost(name, *amounts, seconds * count, of_run)

    def _computing(self, flops: float, moved_bytes: float) -> float:
        card = self._accelerator
        return max(flops / (card.flops(self._itemsize) * self._mfu), moved_bytes / (card.hbm_bytes * _MEMORY_SHARE))

    def _travelling(self, num_bytes: float) -> float:
        card = self._accelerator
        return num_bytes / (min(card.link_bytes, card.network_bytes) if self._spans else card.link_bytes)

    def reward_seconds(self, flops: float) -> float:
        """Of one GPU that computes rewards, as this one does."""
        return flops / (self._accelerator.flops(2) * self._mfu)


def cost(plan: Plan, accelerator: Accelerator, mfu: float) -> Cost:
    """Return what the plan's run costs on this accelerator."""
    run, clock = plan.run, Clock(plan, accelerator, mfu)
    share = (run.num_workers - 1) / run.num_workers  # of a collective, over the links of a worker
    gathered = plan.num_base * run.base_bytes * share if run.zero_stage == 3 else 0.0
    reduced = plan.num_trained * FLOAT32_BYTES * share * (1 if run.zero_stage >= 2 else 2)
    per_backward = reduced if run.zero_stage >= 2 else reduced / max(run.num_forwards // run.num_updates, 1)
    phases = []
    if run.rolls_out:
        forward = play_forward(plan.configs.transformer, plan.sizes(run.micro_batch, max(run.sizes, key=prod)))
        phases.append(clock.phase("rollout", forward, run.num_rollouts * run.num_rollout_steps, link_bytes=gathered))
    branch, count = plan.branch, run.num_forwards
    phases += [
        clock.phase("branches: forward", branch.transformer, count, link_bytes=gathered),
        clock.phase("branches: decode", branch.decoder, count),
        *([_reward(plan, clock)] if run.has_decoder_gradient else []),
        clock.phase("branches: backward", branch.backward, count, link_bytes=gathered + per_backward),
        _update(plan, clock, share),
        _evaluation(plan, clock, gathered),
    ]
    return Cost(tuple(phases), run.num_steps, run.num_workers)


def _reward(plan: Plan, clock: Clock) -> PhaseCost:
    """The exchange, and the wait for one GPU that serves all workers; a reward that is not known takes none."""
    run = plan.run
    images = run.micro_batch * 3 * prod(max(run.sizes, key=prod)) * FLOAT32_BYTES
    flops = sum(tower_flops(TOWERS[name], run.micro_batch) for name in run.rewards if name in TOWERS)
    sent = 2 * images * len(run.rewards)  # to the service, and the gradient back
    seconds = sent / _REWARD_BYTES + clock.reward_seconds(flops * run.num_workers)
    count = run.num_forwards
    return PhaseCost("reward exchange", flops * count, 2 * sent * count, sent * count, seconds * count)


def _update(plan: Plan, clock: Clock, share: float) -> PhaseCost:
    run, parts = plan.run, plan.sharded
    numbers = plan.num_trained if run.zero_stage == 0 else parts.own
    played = Played(12 * numbers, _OPTIMIZER_PASSES * numbers * FLOAT32_BYTES, 0)
    spread = plan.num_trained * run.itemsize * share if run.zero_stage in (1, 2) else 0.0
    return clock.phase("optimizer step", played, run.num_updates, link_bytes=spread)


def _evaluation(plan: Plan, clock: Clock, gathered: float) -> PhaseCost:
    """Evaluations, sample grids and the guard's checks of the whole run."""
    run = plan.run
    sizes = plan.sizes(run.evaluation_batch, run.evaluation_size)
    forward, decoding = play_forward(plan.configs.transformer, sizes), play_decoding(plan.configs.vae, sizes)
    steps, batches = run.num_evaluation_steps, run.num_evaluation_images / (run.num_workers * run.evaluation_batch)
    played = Played(forward.flops * steps + decoding.flops, forward.moved_bytes * steps + decoding.moved_bytes, 0)
    return clock.phase("evaluation and guard", played, batches, link_bytes=gathered * steps, of_run=True)


def cost_if_known(plan: Plan, mfu: float) -> Cost | None:
    """Return the cost, None without an accelerator whose speed is known."""
    card = plan.accelerator
    return None if card is None or not card.bfloat16_flops else cost(plan, card, mfu)
