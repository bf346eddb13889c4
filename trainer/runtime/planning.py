"""Print a run's plan before it starts, and refuse one that cannot fit: see trainer/plan."""

from __future__ import annotations

import os

from services.config.run import RunConfig
from trainer.plan.advice import advice
from trainer.plan.checkpoint_configs import PlanError
from trainer.plan.here import plan_of
from trainer.plan.plan import Plan
from trainer.plan.seconds import DEFAULT_MFU, cost_if_known
from trainer.plan.table import changes_text, summary, verdict


def require_fit(config: RunConfig) -> None:
    """Print the plan's summary. Raise PlanError, with what to change, if the run cannot fit and engine.must_fit."""
    try:
        plan = plan_of(config)
    except PlanError as error:
        if config.engine.accelerator is not None:  # its name may be the mistake
            raise
        print(f"plan: none, {error}", flush=True)
        return
    print(summary(plan, cost_if_known(plan, DEFAULT_MFU), DEFAULT_MFU), flush=True)
    if plan.fits is False and not _may_spread(config):
        _refuse(plan, config.engine.must_fit)


def _may_spread(config: RunConfig) -> bool:
    """Return whether workers on CPUs may run on other hosts than this one, whose memory is not known here."""
    return not config.engine.use_gpu and bool(os.environ.get("RAY_ADDRESS"))


def _refuse(plan: Plan, must_fit: bool) -> None:
    changes = changes_text(advice(plan)) or "nothing that the planner knows would make it fit"
    if not must_fit:
        print(f"plan: goes on, as engine.must_fit is false; what would help: {changes}", flush=True)
        return
    raise PlanError(
        f"{verdict(plan).removeprefix('plan: ')}; what would help: {changes}. To start it all the same: "
        "--set engine.must_fit=false"
    )
