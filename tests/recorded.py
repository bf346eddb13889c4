"""A run as a test records it, and what a MLflow store has of it."""

from __future__ import annotations

import mlflow

from services.clients.delivery import Delivery
from services.clients.spool import Spool
from services.clients.spool_file import read_records

BOUND_S = 60.0


def log_step(spool: Spool, step: int) -> None:
    spool.log_metrics("train", {"loss": 1 / step, "reward": float(step)}, step)


def deliver(spool: Spool, uri: str) -> Delivery:
    delivery = Delivery(spool.folder, uri)
    assert delivery.close(BOUND_S) == 0
    return delivery


def points(uri: str, run_id: str | None, metric: str = "loss") -> list[tuple[int, float, int]]:
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value, point.timestamp) for point in history)


def recorded_points(spool: Spool, metric: str = "loss") -> list[tuple[int, float, int]]:
    records = [each for each in read_records(spool.folder) if metric in each.payload.get("values", ())]
    return [(each.payload["step"], each.payload["values"][metric], each.time_ms) for each in records]
