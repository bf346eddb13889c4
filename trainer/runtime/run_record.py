"""Begin a run's record, take it up and end it: written to the run's folder, and delivered to MLflow by a thread."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from services.clients.delivery import Delivery
from services.clients.run_folder import RunFolder, RunFolderError
from services.clients.spool import Spool
from services.clients.tracking import RunStatus
from services.config.fields import flatten
from services.config.resume import ResumeError, require_same_training
from services.config.run import RunConfig

_PACKAGES = ("srpo-ray", "torch", "deepspeed", "ray", "diffusers", "transformers", "peft")
_GIT_S = 30.0
_FIRST_S, _LAST_S, _UPLOAD_S = 10.0, 60.0, 3600.0  # how long to wait for MLflow: at the start, at the end, for a model


def create(config: RunConfig) -> RunFolder:
    """Make the folder of a new run."""
    record = {"config": config.model_dump(mode="json"), "versions": versions(), "status": "RUNNING"}
    return RunFolder.create(config.output_dir, config.name, record)


def begin(config: RunConfig, run: RunFolder, run_file: Path) -> None:
    """Begin the record of a new run."""
    _start(config, run, run_file)
    _deliver(config, run, _FIRST_S)


def take_up(config: RunConfig, run: RunFolder, run_file: Path) -> None:
    """Go on with a run's record, under a configuration that may differ where the training does not.

    Raise ResumeError where it may not, and RunFolderError if there is nothing left to do.
    """
    record = run.record()
    changes = require_same_training(_recorded_config(run), config)
    if record.get("status") == "FINISHED" and "num_steps" not in changes:
        raise RunFolderError(
            f"run {run.id} has finished its {config.num_steps} steps: prolong it with --set num_steps=…, or start a "
            "new run without --resume"
        )
    spool = Spool(run.path, config.tracking.spool_mib)
    if spool.run is None:  # killed before its record began
        _start(config, run, run_file)
    spool.resume()
    for key, change in changes.items():
        print(f"changed: {key} {change}", flush=True)
        spool.set_tag(f"srpo.changed.{key}", change)
    if (now := versions()) != record.get("versions"):
        print(f"warning: the run began with other versions: {record.get('versions')}, now {now}", flush=True)
    run.write_record({"config": config.model_dump(mode="json"), "versions": now, "status": "RUNNING"})
    _deliver(config, run, _FIRST_S)


def can_go_on(config: RunConfig) -> bool:
    """Return whether the newest run of this name is not finished and is the training that `config` describes."""
    runs = RunFolder.all(config.output_dir, config.name)
    if not runs or runs[-1].record().get("status") == "FINISHED":
        return False
    try:
        require_same_training(_recorded_config(runs[-1]), config)
    except ResumeError:
        return False
    return True


def end(config: RunConfig, run: RunFolder, status: RunStatus) -> None:
    """End the record, and wait a while for MLflow to take what is left of it."""
    run.write_record({**run.record(), "status": status})
    spool = Spool(run.path, config.tracking.spool_mib)
    spool.finish(status)
    has_uploads = status == "FINISHED" and config.tracking.log_model != "never"
    _deliver(config, run, _UPLOAD_S if has_uploads else _LAST_S if status == "FINISHED" else _FIRST_S)


def versions() -> dict[str, str]:
    """Return the versions of what computes a run: packages, and the commit of a checkout."""
    found = {package: version(package) for package in _PACKAGES}
    if (git := shutil.which("git")) is None:  # as in the image
        return found
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_GIT_S)
    return found | ({"commit": answer.stdout.strip()} if answer.returncode == 0 else {})


def _start(config: RunConfig, run: RunFolder, run_file: Path) -> None:
    spool = Spool(run.path, config.tracking.spool_mib)
    spool.start(config.tracking.experiment, config.name, {"srpo.run": run.id, "srpo.folder": str(run.path)})
    spool.log_params(flatten(config.model_dump(mode="json")))
    spool.log_file(run_file)


def _recorded_config(run: RunFolder) -> RunConfig:
    """Return the configuration of a run. Raise ResumeError for one that this version cannot read."""
    try:
        return RunConfig.model_validate(run.record()["config"])
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ResumeError(f"run {run.id} is of another version: this one cannot read its key {key}") from error


def _deliver(config: RunConfig, run: RunFolder, timeout_s: float) -> None:
    delivery = Delivery(run.path, config.tracking.uri)
    if delivery.drain(min(timeout_s, _FIRST_S)) and delivery.trouble is None:
        delivery.drain(timeout_s)
    num_left = delivery.close(timeout_s=0)
    if num_left:
        print(
            f"{num_left} records wait for MLflow at {config.tracking.uri}, in {run.path}; `srpo sync {run.path}` "
            "delivers them",
            flush=True,
        )
    if delivery.url is not None:
        print(f"MLflow: {delivery.url}", flush=True)
