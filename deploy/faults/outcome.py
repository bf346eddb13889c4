"""What a disturbed training left, beside the undisturbed one: weights, record, steps repeated, seconds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from safetensors.torch import load_file

from deploy.faults.training import Training
from services.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Outcome:
    """The numbers of one row. weights: the greatest difference of a weight from the undisturbed run's."""

    name: str
    repeated: int
    seconds: float
    lost_s: float
    missing: int
    doubled: int
    weights: float | None
    said: tuple[str, ...]
    complaints: tuple[str, ...]

    @property
    def is_passed(self) -> bool:
        return not self.complaints


def outcome(
    name: str,
    training: Training,
    undisturbed: Training | None,
    said: Sequence[str],
    *,
    same_weights: bool = True,
    max_repeated: int = 2,
    atol: float = 1e-5,
) -> Outcome:
    """Compare. `said`: parts of the lines that a user must have read. Nothing is raised: complaints are in the row."""
    complaints = []
    has_pictures = not training.said(["pictures are left out of the record"])
    missing, doubled = record_faults(training, has_pictures)
    if missing or doubled:
        complaints.append(f"{missing} metrics missing, {doubled} doubled")
    repeated = sum(count - 1 for count in Counter(training.steps_printed()).values())
    if repeated > max_repeated:
        complaints.append(f"{repeated} steps repeated")
    lines = [training.said([part]) for part in said]
    for part, found in zip(said, lines, strict=True):
        if not found:
            complaints.append(f"nobody said {part!r}")
    difference = None
    if undisturbed is not None and same_weights:
        difference = weights_difference(training, undisturbed)
        if not difference <= atol:
            complaints.append(f"weights differ by {difference:.1e}")
    lost = training.seconds - undisturbed.seconds if undisturbed is not None else 0.0
    shown = tuple(found[0] for found in lines if found)
    return Outcome(name, repeated, training.seconds, lost, missing, doubled, difference, shown, tuple(complaints))


def weights_difference(training: Training, other: Training) -> float:
    """Return the greatest absolute difference of two exported transformers' weights."""
    file = Path("model/transformer/diffusion_pytorch_model.safetensors")
    ours, theirs = (load_file(each.folder.path / file) for each in (training, other))
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours.keys() | theirs.keys())


def record_faults(training: Training, has_pictures: bool) -> tuple[int, int]:
    """Return how many points and, if it should have them, pictures MLflow lacks, and how many it has twice."""
    config, run_id = training.config, training.folder.mlflow_run_id
    if run_id is None:
        return sum(len(steps) for steps in _expected(config).values()), 0
    client = mlflow.MlflowClient(config.tracking.uri)
    missing = doubled = 0
    for metric, steps in _expected(config).items():
        found = Counter(point.step for point in client.get_metric_history(run_id, metric))
        missing += sum(step not in found for step in steps)
        doubled += sum(count - 1 for count in found.values())
    pictures = Counter(
        item.path.split("+step+")[1].split("+")[0]
        for item in client.list_artifacts(run_id, "images")
        if item.path.startswith("images/samples+step+") and item.path.endswith(".png")
    )
    missing += has_pictures * sum(str(step) not in pictures for step in _due(config, config.evaluation.every_num_steps))
    doubled += sum(count - 1 for count in pictures.values())
    return missing, doubled


def _expected(config: RunConfig) -> dict[str, list[int]]:
    """Return which steps each metric must have."""
    steps = list(range(1, config.num_steps + 1))
    step_metrics = ("loss", "skipped_updates", "reward_denoise", "seconds_step", "steering_version")
    assert config.guard is not None
    return {
        **dict.fromkeys(step_metrics, steps),
        "guard/reward": _due(config, config.guard.every_num_steps),
        "eval/reward": [0, config.num_steps],
    }


def _due(config: RunConfig, every: int) -> list[int]:
    return sorted({*range(0, config.num_steps + 1, every), config.num_steps})


def describe(each: Outcome) -> str:
    """Return an outcome as text for the terminal."""
    weights = "–" if each.weights is None else f"{each.weights:.1e}"
    return (
        f"{each.name}: {'passed' if each.is_passed else 'FAILED'}; {each.repeated} steps repeated, {each.lost_s:.0f} s "
        f"lost of {each.seconds:.0f}, {each.missing} missing, {each.doubled} doubled, weights {weights}; "
        f"said: {list(each.said)}; {list(each.complaints)}"
    )


def table(names: Sequence[str], done: Mapping[str, Outcome], shares: Mapping[str, float]) -> str:
    """Return deploy/runs/results/faults.md: the rows of these names, done or not."""
    rows = "\n".join(_row(done[name]) if name in done else f"| {name} | | | | | | not run yet |" for name in names)
    return _PAGE.format(rows=rows, checkpoint=shares["checkpoint"], record=shares["record"])


def _row(each: Outcome) -> str:
    weights = "–" if each.weights is None else f"{each.weights:.0e}"
    said = "<br>".join(re.sub(r"/\S*/", "…/", line)[:150].replace("|", "\\|") for line in each.said)
    passed = "yes" if each.is_passed else "**no**: " + "; ".join(each.complaints)
    cells = (each.name, each.repeated, f"{each.lost_s:.0f}", f"{each.missing}, {each.doubled}", weights, said, passed)
    return "| " + " | ".join(map(str, cells)) + " |"


_PAGE = """# What a training survives

Written by `make faults`, on one machine with two cores: the embedded default, two workers, ZeRO stage 2, a
checkpoint every second step. Each row is a training that is disturbed on purpose (`deploy/faults/`), and taken up
with `srpo run --resume` where its launcher has died. It is compared with a training of the same seed that nothing
disturbs. Seconds lost are wall-clock seconds more than that one took; most of them go into starting processes again.
A row passes if the record in MLflow has every metric and picture of every step once, the exported weights are the
same within 1e-5, no more steps were repeated than lie between two checkpoints (one at most where there was notice),
and the lines in the last column but one were printed.

| fault | steps repeated | seconds lost | metrics missing, doubled | weights differ by | printed | passed |
|---|---|---|---|---|---|---|
{rows}

A checkpoint holds worker 0's training thread up for {checkpoint:.1%} of a step, the record of a step for
{record:.1%} (undisturbed training; steps of about a second).
"""
