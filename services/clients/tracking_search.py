"""Find MLflow runs by a text. MLflow's filters cannot hold a quote, so that names with one need a detour."""

from __future__ import annotations

import re
from typing import Any

NEWEST_FIRST, OLDEST_FIRST = ["attributes.start_time DESC"], ["attributes.start_time ASC"]
Client = Any  # mlflow.MlflowClient, which tracking.py imports
Run = Any  # mlflow.entities.Run


def all_experiments(client: Client) -> list[str]:
    """Return the ids of all experiments."""
    return [each.experiment_id for each in client.search_experiments()]


def search(client: Client, experiments: list[str], field: str, text: str, order: list[str] = NEWEST_FIRST) -> list[Run]:
    """Return the runs whose `field` is `text`: attributes.run_id, attributes.run_name or tags.`KEY`.

    In place of a quote the filter seeks any character, and what is too much is left out here.
    """
    pattern = re.sub("['\"]", "_", text)
    wanted = f"{field} {'=' if pattern == text else 'LIKE'} '{pattern}'"
    return [run for run in client.search_runs(experiments, wanted, order_by=order) if _value(run, field) == text]


def _value(run: Run, field: str) -> str | None:
    kind, _, name = field.partition(".")
    value: str | None = run.data.tags.get(name.strip("`")) if kind == "tags" else getattr(run.info, name)
    return value
