"""Read the comparison's plan (methods, learning rates, seeds, ablations) and make one task for each run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from deploy.settings import ROOT
from services.config.evaluation import StopRuleConfig
from services.config.fields import Frozen, Positive, PositiveFloat, Word
from services.config.run import RunConfig

# judged once by the same process that trains: no Ray, no service, no guard
_IN_ONE_PROCESS = {"guard": None, "engine": {"zero_stage": 0, "num_workers": 1}}


class Variant(Frozen):
    """Changes over the base run file; `learning_rates` in place of the plan's."""

    name: Word
    changes: dict[str, Any]
    learning_rates: tuple[PositiveFloat, ...] = ()


class Plan(Frozen):
    """plan.yaml, where each key is explained."""

    base: Path
    budget_cpu_s: PositiveFloat
    early_share: Annotated[float, Field(gt=0, lt=1)]
    num_processes: Positive
    validation_path: Path
    test_path: Path
    test_images_per_prompt: Annotated[int, Field(ge=2)]  # one picture has no diversity
    sweep_seed: int
    seeds: Annotated[tuple[int, ...], Field(min_length=2)]  # fewer have no standard error
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    methods: Annotated[tuple[Variant, ...], Field(min_length=1)]
    published: Word
    ablated: Word
    ablation_seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    ablations: tuple[Variant, ...]
    hacking: Variant
    hacking_budget_cpu_s: PositiveFloat
    num_hacking_checks: Annotated[int, Field(ge=2)]
    hacking_drift: Word
    default: Path
    default_checks_at_cpu_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    stop_when: Annotated[tuple[StopRuleConfig, ...], Field(min_length=1)]

    def method(self, name: str) -> Variant:
        return next(each for each in self.methods if each.name == name)

    def learning_rates_of(self, method: Variant) -> tuple[float, ...]:
        return method.learning_rates or self.learning_rates


class Task(Frozen):
    """One run: what to train, for how long, and when to judge it (in CPU-seconds of training, rising)."""

    name: str
    config: RunConfig
    checks_at_cpu_s: tuple[float, ...]


def load_plan(path: Path) -> Plan:
    return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def base_task(plan: Plan, prompts_path: Path, seed: int, changes: Mapping[str, Any] | None = None) -> Task:
    """Return the task that judges the untrained model, and the oracle: the same model told the positive word.

    Of `changes`, the control words and the real pictures count.
    """
    wanted = {key: value for key, value in (changes or {}).items() if key in ("control_words", "evaluation")}
    word = wanted.get("control_words", {}).get("positive", "")
    name = "-".join(filter(None, ["base", prompts_path.stem, word, str(seed)]))
    config = _config(plan, merged(wanted, {"evaluation": {"draws_oracle": True}}), prompts_path, seed, None, name)
    return Task(name=name, config=config, checks_at_cpu_s=(0.0,))


def base_of(plan: Plan, task: Task) -> Task:
    """Return the task of the base that a run is compared with: of its prompts, seed, words and real pictures."""
    evaluation, seed = task.config.evaluation, task.config.seed
    assert isinstance(evaluation.prompts_path, Path)
    own = base_task(plan, evaluation.prompts_path, seed)
    if own.config.control_words == task.config.control_words:
        return own
    return base_task(plan, evaluation.prompts_path, seed, plan.hacking.changes)


def sweep_task(plan: Plan, method: Variant, learning_rate: float) -> Task:
    name = f"sweep-{_slug(method.name)}-{learning_rate:g}"
    config = _config(plan, method.changes, plan.validation_path, plan.sweep_seed, learning_rate, name)
    return Task(name=name, config=config, checks_at_cpu_s=(plan.budget_cpu_s,))


def final_task(plan: Plan, method: Variant, learning_rate: float, seed: int) -> Task:
    name = f"final-{_slug(method.name)}-{seed}"
    config = _config(plan, method.changes, plan.test_path, seed, learning_rate, name)
    return Task(name=name, config=config, checks_at_cpu_s=_early_and_end(plan))


def ablation_task(plan: Plan, ablation: Variant, learning_rate: float, seed: int) -> Task:
    """Return the task of an ablation: its changes on top of its method's, at that one's rate or its own."""
    (learning_rate,) = ablation.learning_rates or (learning_rate,)
    name = f"ablation-{_slug(ablation.name)}-{seed}"
    changes = merged(plan.method(plan.ablated).changes, ablation.changes)
    config = _config(plan, changes, plan.validation_path, seed, learning_rate, name)
    return Task(name=name, config=config, checks_at_cpu_s=_early_and_end(plan))


def hacking_task(plan: Plan, seed: int) -> Task:
    """Return the task of a run that the rules must end; it is judged often."""
    (learning_rate,), name = plan.hacking.learning_rates, f"hacking-{seed}"
    config = _config(plan, plan.hacking.changes, plan.validation_path, seed, learning_rate, name)
    every_cpu_s = plan.hacking_budget_cpu_s / plan.num_hacking_checks
    checks = [every_cpu_s * number for number in range(1, plan.num_hacking_checks + 1)]
    return Task(name=name, config=config, checks_at_cpu_s=tuple(checks))


def default_task(plan: Plan, seed: int) -> Task:
    """Return the task of the default recipe, on the table's prompts, with its workers' micro-batches in one."""
    name, engine = f"default-{seed}", yaml.safe_load((ROOT / plan.default).read_text(encoding="utf-8"))["engine"]
    changes = {"engine": {"micro_batch": engine["micro_batch"] * engine["num_workers"]}}
    config = _config(plan, changes, plan.test_path, seed, None, name, base=plan.default)
    return Task(name=name, config=config, checks_at_cpu_s=plan.default_checks_at_cpu_s)


def _early_and_end(plan: Plan) -> tuple[float, float]:
    return plan.early_share * plan.budget_cpu_s, plan.budget_cpu_s


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with `changes` made, section by section.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    result = dict(tree)
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _config(
    plan: Plan,
    changes: Mapping[str, Any],
    prompts_path: Path,
    seed: int,
    learning_rate: float | None,
    name: str,
    base: Path | None = None,
) -> RunConfig:
    file = ROOT / (base or plan.base)
    tree = merged(yaml.safe_load(file.read_text(encoding="utf-8")), _IN_ONE_PROCESS)
    tree = merged(tree, {"evaluation": {"draws_oracle": False}})  # the base's task has it for all
    tree = merged(tree, changes)
    num_images = plan.test_images_per_prompt if prompts_path == plan.test_path else 1
    evaluation = {"prompts_path": str(prompts_path), "num_images_per_prompt": num_images}
    tree = merged(tree, {"name": name, "seed": seed, "evaluation": evaluation})
    if learning_rate is not None:
        tree = merged(tree, {"optimizer": {"learning_rate": learning_rate}})
    return RunConfig.model_validate(tree)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
