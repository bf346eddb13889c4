"""Print a plan: tables that a person would act on, and the lines that a run begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.plan.accelerators import GIB
from trainer.plan.advice import Change
from trainer.plan.plan import Moment, Plan
from trainer.plan.seconds import Cost

_TERA, _GIGA = 1e12, 1e9


def plan_text(plan: Plan, cost: Cost | None, mfu: float, changes: Sequence[Change]) -> str:
    """Return the whole plan as Markdown."""
    parts = [memory_table(plan), _host(plan)]
    if cost is not None:
        parts.append(_time(plan, cost, mfu))
    parts.append(_disk(plan))
    if changes:
        parts.append(_changes(changes))
    return "\n\n".join([verdict(plan), *parts])


def verdict(plan: Plan) -> str:
    """Return one line: what is needed, of what, and whether it fits.

    A run on a CPU is compared with the memory of its host.
    """
    what = "each GPU" if plan.run.use_gpu else "the host"
    peak = plan.peak if plan.run.use_gpu else None
    needs = f"{what} needs {gib(plan.needed_bytes)}" + (f" (at its most: {peak.name})" if peak else "")
    if plan.accelerator is None:
        return f"plan: {needs}; no accelerator is known to compare with: set engine.accelerator or --accelerator"
    fits = "it fits" if plan.fits else "IT DOES NOT FIT"
    return f"plan: {needs} of {gib(plan.accelerator.memory_bytes)} ({plan.accelerator.name}): {fits}"


def summary(plan: Plan, cost: Cost | None, mfu: float) -> str:
    """Return the few lines that a run begins with."""
    lines = [verdict(plan)]
    if cost is not None:
        lines.append(f"plan: {_spoken(cost, plan)} at an assumed MFU of {mfu:g}")
    lines.append(f"plan: {gib(sum(plan.disk_kinds.values()))} of disk")
    return "\n".join(lines)


def gib(num_bytes: float) -> str:
    """
    >>> gib(3 * 2**30), gib(5 * 2**20)
    ('3.0 GiB', '5 MiB')
    """
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"


def changes_text(changes: Sequence[Change]) -> str:
    """Return advice in one line: "ZeRO 3: 31 GiB (fits); …"."""
    return "; ".join(f"{each.keys}: {gib(each.needed_bytes)}{' (fits)' * each.fits}" for each in changes)


def memory_table(plan: Plan) -> str:
    """Return the memory of a worker by kind and by moment."""
    moments = plan.moments
    kinds = list(dict.fromkeys(kind for each in moments for kind, size in each.kinds.items() if size))
    rows = [[kind, *(_cell(each, kind) for each in moments)] for kind in kinds]
    total = ["**all**", *(f"**{gib(each.total_bytes)}**" for each in moments)]
    whose = "GPU" if plan.run.use_gpu else "worker"
    return table(f"memory of each {whose}", [each.name for each in moments], [*rows, total])


def _cell(moment: Moment, kind: str) -> str:
    size = moment.kinds.get(kind, 0)
    return gib(size) if size else ""


def _host(plan: Plan) -> str:
    count = plan.run.gpus_per_host
    rows = [[kind, gib(size)] for kind, size in plan.host_kinds.items()]
    title = f"memory of each host, {count} worker{'s' * (count > 1)}"
    return table(title, ["bytes"], [*rows, ["**at once**", f"**{gib(plan.host_bytes)}**"]])


def _time(plan: Plan, cost: Cost, mfu: float) -> str:
    rows = [
        [
            f"{each.name}{' (whole run)' * each.is_of_run}",
            f"{each.flops / _TERA:,.4g}",
            f"{each.moved_bytes / _GIGA:,.4g}",
            f"{each.link_bytes / _GIGA:,.4g}",
            f"{each.seconds:.3g}",
        ]
        for each in cost.phases
    ]
    assert plan.accelerator is not None
    head = ["TFLOP", "GB in memory", "GB between workers", "seconds"]
    source = f"MFU {mfu:g} assumed; {plan.accelerator.source}"
    return f"{table('per worker and step', head, rows)}\n\n{_spoken(cost, plan)} ({source})"


def _spoken(cost: Cost, plan: Plan) -> str:
    unit = "GPU-hours" if plan.run.use_gpu else "worker-hours"
    hours = f"{cost.run_hours:.3g} h, {cost.gpu_hours:.3g} {unit}"
    return f"{cost.step_seconds:.3g} s/step, {hours} for {cost.num_steps} steps"


def _disk(plan: Plan) -> str:
    rows = [[kind, gib(size)] for kind, size in plan.disk_kinds.items() if size]
    return table("disk of the run", ["bytes"], [*rows, ["**all**", f"**{gib(sum(plan.disk_kinds.values()))}**"]])


def _changes(changes: Sequence[Change]) -> str:
    rows = [[each.keys, gib(each.needed_bytes), "yes" if each.fits else "no"] for each in changes]
    return table("what to change", ["needs", "fits"], rows)


def table(title: str, heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    heads = list(heads)
    lines = [f"| {' | '.join([title, *heads])} |", "|---" + "|---:" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
