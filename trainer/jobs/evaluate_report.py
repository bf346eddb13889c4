"""Compare policies by what an evaluation has kept of them: intervals from paired draws of prompts, and a report.

One process does this. It reads numbers and features, and of the pictures only those that it shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from services.config.run import RunConfig
from trainer.evaluation.bootstrap import Interval, draws_of_prompts, interval
from trainer.evaluation.frechet import gaussian_of
from trainer.evaluation.judges import style_references
from trainer.evaluation.kept_chunks import KeptChunks
from trainer.evaluation.measurements import REFERENCE
from trainer.evaluation.paired import gaps_closed
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.report import Column, render
from trainer.evaluation.summary import summarize_draws
from trainer.evaluation.viewing import Pair, choose_rows, render_viewing
from trainer.jobs.evaluate_plan import BASE, ORACLE, Plan, PolicyPlan
from trainer.jobs.evaluate_share import FEATURES, values_of


def compare(config: RunConfig, plan: Plan) -> list[Column]:
    """Return each policy's numbers and its differences from the base model, with intervals from paired draws."""
    settings, num_prompts = config.comparison, len(plan.prompts) // config.comparison.num_images_per_prompt
    draws = draws_of_prompts(num_prompts, settings.num_draws, config.seed)
    counts = torch.cat([torch.ones(1, num_prompts), draws])  # all prompts, then each draw of them
    references = _references(config, plan)
    seen = {policy.name: _summaries(plan, policy, counts, references) for policy in plan.policies}
    base, columns = seen[BASE], []
    for policy in plan.policies:
        values = seen[policy.name]
        if ORACLE in seen and policy.name not in (BASE, ORACLE):
            values |= gaps_closed(base, values, seen[ORACLE])
        numbers = {key: _interval(column, settings.confidence) for key, column in values.items()}
        differences = {
            key: _interval(column - base[key], settings.confidence) for key, column in values.items() if key in base
        }
        shown = pictures(plan, policy, range(min(config.evaluation.num_grid_images, len(plan.prompts))))
        columns.append(Column(policy.name, shown, numbers, {} if policy.name == BASE else differences))
    return columns


def write_report(config: RunConfig, plan: Plan, columns: Sequence[Column], folder: Path) -> tuple[Path, Path]:
    """Write report.html and numbers.json into `folder`. Return their paths."""
    settings, prompts = config.comparison, plan.prompts
    trained = " and ".join(reward.name for reward in config.rewards)
    each = settings.num_images_per_prompt
    explained = (
        f"{len(prompts) // each} held-out prompts × {each} pictures, the same noise for every policy. In brackets "
        f"{settings.confidence:.0%} intervals over prompts (paired bootstrap, {settings.num_draws} draws); below a "
        f"number its difference from the base model, bold where the interval excludes 0. The run trains on {trained}."
    )
    numbers = {
        column.name: {
            key: {"value": asdict(value)}
            | ({"difference": asdict(column.differences[key])} if key in column.differences else {})
            for key, value in column.numbers.items()
        }
        for column in columns
    }
    report, table = folder / "report.html", folder / "numbers.json"
    shown = prompts[: config.evaluation.num_grid_images]
    report.write_text(render(f"{config.name}: comparison", explained, columns, shown), encoding="utf-8")
    table.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return report, table


def write_viewing(config: RunConfig, plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Write the page of a blind viewing of base and first model, and its key, if wanted. Return their paths."""
    settings, prompts = config.comparison, plan.prompts
    if not settings.num_viewing_pairs:
        return ()
    base, model = plan.policies[0], next(each for each in plan.policies if each.weights is not None)
    rows = choose_rows(len(prompts), settings.num_viewing_pairs, config.seed)
    truth = truth_of(config, {prompts[row] for row in rows}) or {}
    shown = zip(rows, pictures(plan, base, rows), pictures(plan, model, rows), strict=True)
    pairs = [Pair(prompts[row], before, after, truth.get(prompts[row])) for row, before, after in shown]
    page, key = render_viewing(f"{config.name}: blind viewing", pairs, config.seed)
    paths = folder / "viewing.html", folder / "viewing_key.json"
    paths[0].write_text(page, encoding="utf-8")
    paths[1].write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def pictures(plan: Plan, policy: PolicyPlan, rows: Sequence[int]) -> Tensor:
    """Read some of a policy's pictures, (num_rows, 3, height, width) uint8."""
    kept = KeptChunks(Path(policy.drawn))
    return torch.cat([kept.rows(row // plan.batch, "images", [row % plan.batch]) for row in rows])


def _summaries(
    plan: Plan, policy: PolicyPlan, counts: Tensor, references: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return a policy's numbers on all prompts and on each draw of them, (1 + num_draws,) by name."""
    chunks = [KeptChunks(Path(policy.measured)).get(chunk) for chunk in range(plan.num_chunks)]
    whole = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return summarize_draws(values_of(whole), whole[FEATURES], counts, references)


def _references(config: RunConfig, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and covariance of the features of real pictures, by the name of the distance to them."""
    evaluation = config.evaluation
    references = style_references(evaluation.judge_path) if evaluation.judge_path is not None else {}
    if evaluation.reference_path is None:
        return references
    kept = KeptChunks(Path(plan.reference))
    features = torch.cat([kept.get(chunk)[FEATURES] for chunk in range(plan.num_reference_chunks)])
    return references | {REFERENCE: gaussian_of(features)}


def _interval(values: Tensor, confidence: float) -> Interval:
    return interval(float(values[0]), values[1:], confidence)
