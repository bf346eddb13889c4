"""Record a run in MLflow: parameters, metrics, pictures, files and its end. No other file imports MLflow.

This file adds three things to MLflow's client. Every call is synchronous, so that nothing that was logged is lost with
the process. Every call is bounded in time: with MLflow's defaults a dead server blocks its caller for minutes. Every
failure is a TrackingError that names the server. A training writes to a spool (spool.py), and delivery.py calls this.

    tracker = Tracker.start("http://127.0.0.1:5000", experiment="srpo", name="tiny_srpo")
    tracker.log_config(config)
    tracker.log_metrics({"reward": 0.4, "loss": 0.3}, step=1)
    tracker.finish("FINISHED")
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import mlflow
import PIL.Image
import requests
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from pydantic import BaseModel

from services.clients.patience import be_patient, setting, upload_timeout_s
from services.clients.tracking_errors import RefusedError, TrackingError, check_metric_name, kind_of, reason_of
from services.clients.tracking_search import OLDEST_FIRST, all_experiments, search
from services.config.fields import flatten

__all__ = ["RefusedError", "RunStatus", "Tracker", "TrackingError", "check_metric_name", "flatten"]

_PARAMS_PER_CALL = 100  # the tracking API's limit

T = TypeVar("T")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Point = tuple[str, float, int, int]  # a metric's name and value, its time in milliseconds, its step


class Tracker:
    """One MLflow run, made with `start` or `resume`."""

    def __init__(self, client: mlflow.MlflowClient, uri: str, run_id: str) -> None:
        self._client = client
        self.uri = uri
        self.run_id = run_id

    @classmethod
    def start(
        cls, uri: str, experiment: str, name: str, tags: Mapping[str, str] | None = None, time_ms: int | None = None
    ) -> Tracker:
        """Open a new run called `name`. Raise TrackingError if the server cannot be reached."""
        client = _connect(uri)

        def create() -> str:
            experiment_id = _experiment_id(client, uri, experiment)
            with setting("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"):  # a repeated request opens a second run
                run = client.create_run(experiment_id, time_ms, dict(tags or {}), name)
            return str(run.info.run_id)

        return cls(client, uri, _bounded(uri, f"start run {name!r}", create))

    @classmethod
    def open(cls, uri: str, run_id: str) -> Tracker:
        """Return an existing run as it is, without asking the server."""
        return cls(_connect(uri), uri, run_id)

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
            runs = search(client, [_experiment_id(client, uri, experiment)], "attributes.run_name", name)
            if not runs:
                raise MlflowException(f"experiment {experiment!r} has none")
            return str(runs[0].info.run_id)

        return cls(client, uri, _bounded(uri, f"find run {name!r}", find))

    @classmethod
    def running(cls, uri: str, run: str) -> Tracker:
        """Return the training run of this id, or the last one of this name. Raise TrackingError if none is training."""
        client = _connect(uri)

        def find() -> str:
            for field in ("attributes.run_id", "attributes.run_name"):
                for found in search(client, all_experiments(client), field, run):
                    if found.info.status == "RUNNING":
                        return str(found.info.run_id)
            raise MlflowException("no run of this name or id is running")

        return cls(client, uri, _bounded(uri, f"find run {run!r}", find))

    @classmethod
    def tagged(cls, uri: str, key: str, value: str) -> list[Tracker]:
        """Return the runs that have this tag, the first of them first."""
        client = _connect(uri)

        def find() -> list[Run]:
            return search(client, all_experiments(client), f"tags.`{key}`", value, OLDEST_FIRST)

        return [cls(client, uri, str(run.info.run_id)) for run in _bounded(uri, f"find the run {key}={value}", find)]

    @property
    def url(self) -> str:
        """The address of this run's page in MLflow."""
        run = _bounded(self.uri, "look up the run", lambda: self._client.get_run(self.run_id))
        return f"{self.uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"

    def require_active(self) -> None:
        """Raise TrackingError if the run is gone or in MLflow's trash."""
        if (
            _bounded(self.uri, "find the run", lambda: self._client.get_run(self.run_id)).info.lifecycle_stage
            != "active"
        ):
            raise TrackingError(f"MLflow at {self.uri}: run {self.run_id} was deleted: restore it there")

    def discard_empty(self) -> None:
        """Put the run into MLflow's trash if it has no metrics."""
        if not _bounded(self.uri, "look up a run", lambda: self._client.get_run(self.run_id)).data.metrics:
            self._call("delete a run", self._client.delete_run, self.run_id)

    def log_config(self, config: BaseModel) -> None:
        """Log every setting as a parameter under its dotted key. It may be repeated with equal values."""
        self.log_params(flatten(config.model_dump(mode="json")))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters. Raise RefusedError if one has another value already."""
        each = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(each), _PARAMS_PER_CALL):
            batch = each[start : start + _PARAMS_PER_CALL]
            self._call("log parameters", self._client.log_batch, self.run_id, params=batch, synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all numbers of one step in one call (about 0.1 s on a busy machine, whatever their count)."""
        now_ms = int(time.time() * 1000)
        self.log_points([(name, value, now_ms, step) for name, value in metrics.items()])

    def log_points(self, points: Sequence[Point]) -> None:
        """Log up to 1,000 numbers in one call, each with a step and a time of its own."""
        batch = [Metric(name, float(value), time_ms, step) for name, value, time_ms, step in points]
        what = f"log step {points[0][-1]}"
        self._call(what, self._client.log_batch, self.run_id, metrics=batch, synchronous=True)

    def log_image(self, image: PIL.Image.Image, key: str, step: int) -> None:
        """Log a picture of a step. MLflow's page shows all pictures of a key with one slider over steps."""
        self._call(f"log image {key}", self._client.log_image, self.run_id, image, key=key, step=step, synchronous=True)

    def log_image_file(self, path: Path) -> None:
        """Log a picture from a file that is called as `log_image` would call it. It may be repeated."""
        with TemporaryDirectory() as folder, PIL.Image.open(path) as image:
            thumbnail = Path(folder) / f"{path.stem}+compressed.webp"
            compress_image_size(image).save(thumbnail)
            for each in (path, thumbnail):
                self.log_file(each, "images")
        self.set_tag(MLFLOW_LOGGED_IMAGES, "True")

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, into `folder` there. Raise FileNotFoundError if it is missing."""
        if not path.is_file():
            raise FileNotFoundError(f"no file to log at {path}")
        with setting("MLFLOW_HTTP_REQUEST_TIMEOUT", upload_timeout_s(path)):
            self._call(f"upload {path.name}", _any_store(self._client.log_artifact), self.run_id, str(path), folder)

    def log_model_folder(self, folder: Path, name: str = "model") -> None:
        """Copy a whole model folder to the run's artifacts. Raise FileNotFoundError if it is missing."""
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder to log at {folder}")
        self._call(f"upload {folder.name}/", self._client.log_artifacts, self.run_id, str(folder), name)

    def has_file(self, name: str, folder: str | None = None) -> bool:
        """Return whether the run's artifacts have a file of this name in `folder`."""
        paths = _bounded(self.uri, "list files", lambda: self._client.list_artifacts(self.run_id, folder))
        return any(item.path.rpartition("/")[2] == name for item in paths)

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
        return {step: value for _, value, _, step in sorted(self.points(metric), key=lambda point: point[2])}

    def points(self, metric: str) -> list[Point]:
        """Return all that was logged of a metric."""
        points = _bounded(self.uri, "read a metric", lambda: self._client.get_metric_history(self.run_id, metric))
        return [(metric, point.value, point.timestamp, point.step) for point in points]

    def images(self, key: str, folder: Path) -> dict[int, Path]:
        """Copy the pictures that log_image has logged under `key` into `folder`; return their paths by step."""

        def copy() -> dict[int, Path]:
            paths = [item.path for item in self._client.list_artifacts(self.run_id, "images")]
            name = re.escape(key.replace("/", "~"))
            found = [re.fullmatch(rf"images/{name}[+%]step[+%](\d+)[+%].*\.png", path) for path in paths]
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

    def finish(self, status: RunStatus = "FINISHED", time_ms: int | None = None) -> None:
        """End the run."""
        self._call(f"end the run as {status}", self._client.set_terminated, self.run_id, status, time_ms)

    def _call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        _bounded(self.uri, what, lambda: function(*args, **kwargs))


def _connect(uri: str) -> mlflow.MlflowClient:
    be_patient()
    # Artifact upload resolves mlflow-artifacts:/ against the global URI, not against the client's.
    mlflow.set_tracking_uri(uri)
    return _bounded(uri, "connect", lambda: mlflow.MlflowClient(tracking_uri=uri))


def _experiment_id(client: mlflow.MlflowClient, uri: str, name: str) -> str:
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, _artifact_location(uri, name)))
    except MlflowException:  # another run may have created it in between; if not, the error is raised again
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Return where files go: beside a SQLite file (MLflow takes the current folder). A server knows its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    return str(database.parent / "mlartifacts" / quote(experiment, safe=""))


def _any_store(upload: Callable[..., None]) -> Callable[..., None]:
    """Return the upload with every exception as MLflow's: a store raises what its library raises."""

    def call(*args: Any) -> None:
        try:
            upload(*args)
        except (MlflowException, requests.RequestException):
            raise
        except Exception as error:
            raise MlflowException(f"{type(error).__name__}: {error}") from error

    return call


def _bounded(uri: str, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except (MlflowException, requests.RequestException) as error:
        raise kind_of(error)(f"MLflow at {uri}: cannot {what}: {reason_of(error)}") from error
