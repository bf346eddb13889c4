"""Write the plans of the recipes, run files for real GPUs, into deploy/runs/README.md: `make recipes`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from services.config.run import load_run_config
from trainer.plan.accelerators import accelerator
from trainer.plan.here import plan_of
from trainer.plan.plan import Plan
from trainer.plan.seconds import DEFAULT_MFU, Cost, cost
from trainer.plan.table import gib, memory_table, table, verdict

RUNS = Path(__file__).parent / "runs"
PAGE = RUNS / "README.md"
_TRAINING_GPUS = 7  # of a node's 8; the eighth serves rewards
BEGIN, END = "<!-- plans: `make recipes` writes them -->\n", "<!-- end of plans -->\n"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run file and the GPU it is for."""

    name: str
    card: str

    def plan(self) -> Plan:
        return plan_of(load_run_config(RUNS / f"{self.name}.yaml"), self.card, _TRAINING_GPUS)


RECIPES = (
    Recipe("flux1_dev_full_zero2_8x80", "h100"),
    Recipe("flux1_dev_full_zero3_8x80", "h100"),
    Recipe("flux1_dev_lora_1x80", "h100"),
    Recipe("flux1_dev_full_4x8x80", "h100"),
)


def plans() -> str:
    """Return the section of the page: one table over all recipes, and the memory of each."""
    made = [(each, each.plan()) for each in RECIPES]
    costs = [(each, plan, cost(plan, accelerator(each.card), DEFAULT_MFU)) for each, plan in made]
    heads = ("GPU", "of", "peak", "host", "disk", "s/step", "GPU-hours")
    parts = [table("recipe", heads, [_row(*each) for each in costs])]
    parts += [f"### {each.name}\n\n{_verdict(plan)}\n\n{memory_table(plan)}" for each, plan in made]
    return "\n\n".join(parts) + "\n"


def _row(recipe: Recipe, plan: Plan, spent: Cost) -> list[str]:
    link = f"[{recipe.name}]({recipe.name}.yaml)"
    memory, disk = gib(accelerator(recipe.card).memory_bytes), gib(sum(plan.disk_kinds.values()))
    time = f"{spent.step_seconds:.3g}", f"{spent.gpu_hours:.2g}"
    needs = f"{gib(plan.needed_bytes)} ({plan.peak.name})", gib(plan.host_bytes)
    return [link, f"{plan.run.num_workers} × {recipe.card}", memory, *needs, disk, *time]


def _verdict(plan: Plan) -> str:
    return f"`{verdict(plan)}`"


def renewed(page: str) -> str:
    """Return the page with the plans as they are now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{plans()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
