"""Say what to change if a run does not fit: each change is planned, and listed with what it then needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from services.config.finetune import FinetuneConfig
from trainer.plan.plan import Plan
from trainer.plan.planned_run import PlannedRun

_MAX_TOGETHER = 3
_MAX_SHOWN = 8
_WITHOUT_TEXT = {"encodes_prompts": False, "num_prompts": 0}
_ITEMSIZES = ("itemsize", "vae_itemsize", "text_itemsize", "rollout_itemsize")
Option = tuple[str, dict[str, Any]]  # keys of the run file as a person writes them; fields of PlannedRun


@dataclass(frozen=True, slots=True)
class Change:
    """Keys of the run file with new values, and what the run needs then."""

    keys: str
    needed_bytes: int
    fits: bool


def advice(plan: Plan) -> list[Change]:
    """Return changes that help, the fewest first: single ones, and together those of two or three that then fit."""
    options = [each for each in _options(plan.run) if _planned(plan, each[1]) < plan.needed_bytes]
    found = [_change(plan, [each]) for each in options]
    for count in range(2, _MAX_TOGETHER + 1):
        if any(each.fits for each in found):
            break
        found += [change for each in combinations(options, count) if (change := _change(plan, list(each))).fits]
    return sorted(found, key=lambda each: (not each.fits, each.needed_bytes))[:_MAX_SHOWN]


def _options(run: PlannedRun) -> list[Option]:
    """Return keys and what they change, without those that this run has already or cannot have."""
    return [
        (keys, changed)
        for is_possible, keys, changed in (*_layouts(run), *_models(run))
        if is_possible and any(getattr(run, name) != value for name, value in changed.items())
    ]


def _layouts(run: PlannedRun) -> list[tuple[bool, str, dict[str, Any]]]:
    return [
        (True, "engine.gradient_checkpointing true", {"checkpointing": 1}),
        (run.zero_stage < 2, "engine.zero_stage 2", {"zero_stage": 2}),
        (run.num_workers > 1, "engine.zero_stage 3", {"zero_stage": 3}),
        (run.encodes_prompts, "prompts.embeddings_path (srpo encode-prompts)", _WITHOUT_TEXT),
        (True, "evaluation.batch 1", {"evaluation_batch": 1}),
    ]


def _models(run: PlannedRun) -> list[tuple[bool, str, dict[str, Any]]]:
    default = FinetuneConfig.model_fields
    lora = {"is_lora": True, "rank": default["rank"].default, "targets": default["target_modules"].default}
    halved = {**dict.fromkeys(_ITEMSIZES, 2), "zero_stage": max(run.zero_stage, 1)}
    return [
        (run.use_gpu and run.itemsize > 2, "model.dtype bfloat16", halved),
        (not run.is_lora, "finetune.kind lora", lora),
    ]


def _change(plan: Plan, options: list[Option]) -> Change:
    changed = {key: value for _, each in options for key, value in each.items()}
    needed = _planned(plan, changed)
    available = plan.available_bytes
    return Change(", ".join(name for name, _ in options), needed, available is not None and needed <= available)


def _planned(plan: Plan, changed: dict[str, Any]) -> int:
    return replace(plan, run=replace(plan.run, **changed)).needed_bytes
