"""Record a run in MLflow: parameters, metrics, pictures, files and its end. No other file imports MLflow.

This file adds three things to MLflow's client. Every call is synchronous, so that nothing that was logged is lost with
the process. Every call is bounded in time: with MLflow's defaults a dead server blocks a training for minutes. Every
failure is a TrackingError that names the server.

    tracker = Tracker.start("http://127.0.0.1:5000", experiment="srpo", name="tiny_srpo")
    tracker.log_config(config)
    tracker.log_metrics({"reward": 0.4, "loss": 0.3}, step=1)
    tracker.finish("FINISHED")
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import mlflow
import PIL.Image
import requests
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from pydantic import BaseModel

# MLflow reads them at each call. They are defaults: the environment may ask for more patience with a slow server.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds that a server may stay silent: the training may keep all cores busy
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the callers print the address themselves
}
_PARAMS_PER_CALL = 100  # the tracking API's limit

T = TypeVar("T")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingError(RuntimeError):
    """The tracking server failed or refused; the text names its URI and what was to be done."""


class Tracker:
    """One MLflow run, made with `start` or `resume`. In a distributed training only rank 0 holds one."""

    def __init__(self, client: mlflow.MlflowClient, uri: str, run_id: str) -> None:
        self._client = client
        self.uri = uri
        self.run_id = run_id

    @classmethod
    def start(cls, uri: str, experiment: str, name: str, tags: Mapping[str, str] | None = None) -> Tracker:
        """Open a new run called `name`. Raise TrackingError if the server cannot be reached."""
        client = _connect(uri)

        def create() -> str:
            run = client.create_run(_experiment_id(client, experiment), run_name=name, tags=dict(tags or {}))
            return str(run.info.run_id)

        return cls(client, uri, _bounded(uri, f"start run {name!r}", create))

    @classmethod
    def resume(cls, uri: str, run_id: str) -> Tracker:
        """Continue an existing run, as a restarted worker does. Raise TrackingError if there is none."""
        client = _connect(uri)
        _bounded(uri, f"resume run {run_id}", lambda: client.update_run(run_id, status="RUNNING"))
        return cls(client, uri, run_id)

    @classmethod
    def latest(cls, uri: str, experiment: str, name: str) -> Tracker:
        """Return the run last started under this name, for reading. Raise TrackingError if there is none."""
        client = _connect(uri)

        def find() -> str:
            query, order = f"attributes.run_name = '{name}'", ["attributes.start_time DESC"]
            runs = client.search_runs([_experiment_id(client, experiment)], query, max_results=1, order_by=order)
            if not runs:
                raise MlflowException(f"experiment {experiment!r} has none")
            return str(runs[0].info.run_id)

        return cls(client, uri, _bounded(uri, f"find run {name!r}", find))

    @classmethod
    def running(cls, uri: str, run: str) -> Tracker:
        """Return the training run of this id, or the last one of this name. Raise TrackingError if none is training."""
        client = _connect(uri)

        def find() -> str:
            experiments = [each.experiment_id for each in client.search_experiments()]
            for attribute in ("run_id", "run_name"):
                query, order = f"attributes.{attribute} = '{run}'", ["attributes.start_time DESC"]
                query += " and attributes.status = 'RUNNING'"
                for found in client.search_runs(experiments, query, max_results=1, order_by=order):
                    return str(found.info.run_id)
            raise MlflowException("no run of this name or id is running")

        return cls(client, uri, _bounded(uri, f"find run {run!r}", find))

    @property
    def url(self) -> str:
        """The address of this run's page in MLflow."""
        run = _bounded(self.uri, "look up the run", lambda: self._client.get_run(self.run_id))
        return f"{self.uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"

    def log_config(self, config: BaseModel) -> None:
        """Log every setting as a parameter under its dotted key. It may be repeated with equal values."""
        flat = flatten(config.model_dump(mode="json"))
        params = [Param(key, str(value)) for key, value in flat.items()]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            batch = params[start : start + _PARAMS_PER_CALL]
            self._call("log parameters", self._client.log_batch, self.run_id, params=batch, synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all numbers of one step in one call (about 0.1 s on a busy machine, whatever their count)."""
        now_ms = int(time.time() * 1000)
        batch = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        self._call(f"log step {step}", self._client.log_batch, self.run_id, metrics=batch, synchronous=True)

    def log_image(self, image: PIL.Image.Image, key: str, step: int) -> None:
        """Log a picture of a step. MLflow's page shows all pictures of a key with one slider over steps."""
        self._call(f"log image {key}", self._client.log_image, self.run_id, image, key=key, step=step, synchronous=True)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, into `folder` there. Raise FileNotFoundError if it is missing."""
        if not path.is_file():
            raise FileNotFoundError(f"no file to log at {path}")
        self._call(f"upload {path.name}", self._client.log_artifact, self.run_id, str(path), folder)

    def log_model_folder(self, folder: Path, name: str = "model") -> None:
        """Copy a whole model folder to the run's artifacts. Raise FileNotFoundError if it is missing."""
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder to log at {folder}")
        self._call(f"upload {folder.name}/", self._client.log_artifacts, self.run_id, str(folder), name)

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run, or replace it."""
        self._call(f"set tag {key}", self._client.set_tag, self.run_id, key, value, synchronous=True)

    def clear_tag(self, key: str) -> None:
        """Remove a tag, if there is one."""
        if key in self.tags():
            self._call(f"remove tag {key}", self._client.delete_tag, self.run_id, key)

    def tags(self) -> dict[str, str]:
        """Return all tags of the run, MLflow's own among them."""
        return dict(_bounded(self.uri, "read the tags", lambda: self._client.get_run(self.run_id).data.tags))

    def history(self, metric: str) -> dict[int, float]:
        """Return a metric by step; for a repeated step, its last value."""
        points = _bounded(self.uri, "read a metric", lambda: self._client.get_metric_history(self.run_id, metric))
        return {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}

    def images(self, key: str, folder: Path) -> dict[int, Path]:
        """Copy the pictures that log_image has logged under `key` into `folder`; return their paths by step."""

        def copy() -> dict[int, Path]:
            paths = [item.path for item in self._client.list_artifacts(self.run_id, "images")]
            found = [re.fullmatch(rf"images/{re.escape(key)}[+%]step[+%](\d+)[+%].*\.png", path) for path in paths]
            return {
                int(each[1]): Path(self._client.download_artifacts(self.run_id, each[0], str(folder)))
                for each in found
                if each
            }

        return _bounded(self.uri, f"read the pictures {key}", copy)

    def run_file(self, folder: Path) -> Path:
        """Copy the run file, which trainer/launch.py logs, into `folder`. Raise TrackingError if there is none."""

        def copy() -> Path:
            for item in self._client.list_artifacts(self.run_id):
                if item.path.endswith((".yaml", ".yml")):
                    return Path(self._client.download_artifacts(self.run_id, item.path, str(folder)))
            raise MlflowException("none was logged")

        return _bounded(self.uri, "read the run file", copy)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run."""
        self._call(f"end the run as {status}", self._client.set_terminated, self.run_id, status)

    def _call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        _bounded(self.uri, what, lambda: function(*args, **kwargs))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under dotted keys.

    >>> flatten({"seed": 0, "engine": {"zero_stage": 2}})
    {'seed': 0, 'engine.zero_stage': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}  # rewards.0.name
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _connect(uri: str) -> mlflow.MlflowClient:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # Artifact upload resolves mlflow-artifacts:/ against the global URI, not against the client's.
    mlflow.set_tracking_uri(uri)
    return _bounded(uri, "connect", lambda: mlflow.MlflowClient(tracking_uri=uri))


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another run may have created it in between; if not, the error is raised again
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _bounded(uri: str, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except (MlflowException, requests.RequestException) as error:
        raise TrackingError(f"MLflow at {uri}: cannot {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    causes = (error, error.__context__)
    if any(isinstance(cause, requests.RequestException) for cause in causes):
        return "it does not answer; `make up` starts a local server, tracking.uri names another"
    return str(error).splitlines()[0]
