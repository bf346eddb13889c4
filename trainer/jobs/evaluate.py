"""`srpo evaluate RUN.yaml [MODEL …]`: compare models with the base model on held-out prompts, with intervals.

`python -m trainer.jobs.evaluate`, as a Ray job or in the foreground. Every policy draws the same prompts from the same
noise. Every reward that the service has, every judge and every statistic measures the pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from services.clients.reward import RewardClient, RewardError
from services.clients.tracking import RunStatus, Tracker, TrackingError
from services.config.finetune import FinetuneConfig
from services.config.run import ConfigError, RunConfig, load_run_config
from trainer.algorithm.rollout import Sampling
from trainer.data.conditioning import encoder, load_policy
from trainer.data.prompt_files import load_prompts, locate_prompts
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.data.run_prompts import told_prompts
from trainer.draws import evaluation_generator
from trainer.evaluation.bootstrap import Interval, draws_of_prompts, interval
from trainer.evaluation.drawing import PictureSet
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurements, Measurer
from trainer.evaluation.paired import gaps_closed
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.report import Column, render
from trainer.evaluation.similarities import measures_of
from trainer.evaluation.viewing import Pair, choose_rows, render_viewing
from trainer.model.engine import checkpoint_weights
from trainer.model.lora import whole_weights
from trainer.model.policy import Policy

_BASE, _ORACLE = "base", "oracle"
_FOLDER = "comparison"


class EvaluateError(ValueError):
    """A model or checkpoint cannot be evaluated; the text names it and the cure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 with a line on stderr."""
    parser = argparse.ArgumentParser(prog="srpo evaluate", description="Compare models with a run's base model.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("models", nargs="*", help="[NAME=]FOLDER: a model or a checkpoint (the run's own model)")
    args = parser.parse_args(arguments)
    try:
        config = load_run_config(args.run_file)
        folders = named_folders(args.models or [f"aligned={config.output_dir / config.name / 'model'}"])
        report, url = evaluate(config, folders)
    except (ConfigError, EvaluateError, RewardError, TrackingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done: {report}  {url}")
    return 0


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the policies to compare with the base model, by name. Raise EvaluateError.

    >>> named_folders(["step40=outputs/x/checkpoints/y/checkpoint_2"])
    {'step40': PosixPath('outputs/x/checkpoints/y/checkpoint_2')}
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        name = name or Path(path).name
        if name in (_BASE, _ORACLE) or name in folders:
            raise EvaluateError(f"two policies are called {name!r}: name them, as in other={path}")
        if not (Path(path) / "model_index.json").is_file() and not (Path(path) / "policy").is_dir():
            raise EvaluateError(
                f"{path} is neither a model folder nor a checkpoint: give one, or run the training first"
            )
        folders[name] = Path(path)
    return folders


def evaluate(config: RunConfig, folders: Mapping[str, Path]) -> tuple[Path, str]:
    """Draw with each policy, measure, bootstrap, write the report. Return its path and the MLflow run's URL."""
    tracker = Tracker.start(config.tracking.uri, config.tracking.experiment, f"{config.name} {_FOLDER}")
    status: RunStatus = "FAILED"
    try:
        service = config.reward_service
        with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts) as client:
            columns = measure(config, make_measurer(config, client), draw(config, folders))
        files = (*write_report(config, columns), *write_viewing(config, columns))
        for column in columns:
            tracker.log_metrics(dict(_flat(column)), step=0)
        for file in files:
            tracker.log_file(file)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    return files[0], tracker.url


def make_measurer(config: RunConfig, client: RewardClient) -> Measurer:
    """Return a measurer with all rewards that are served, judges, statistics and the folder of real pictures."""
    evaluation = config.evaluation
    rewards = measures_of(client, config, {f"reward_{name}": name for name in client.models()})
    judges = Judges.load(evaluation.judge_path, _device(config)) if evaluation.judge_path else None
    truth = truth_of(config, set(held_out_prompts(config)))
    repeats = config.comparison.num_images_per_prompt
    return Measurer(rewards, judges, evaluation.reference_path, repeats, truth, evaluation.batch)


@torch.no_grad()
def draw(config: RunConfig, folders: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and images (num_images, 3, height, width) uint8 of base, oracle if wanted, and each model."""
    model, evaluation = config.model, config.evaluation
    policy = load_policy(config, _device(config))
    size = model.height_px, model.width_px
    shift = policy.resolve_shift(config.rollout.shift, *size)
    sampling = Sampling(evaluation.num_steps, evaluation.guidance_scale, shift, *size)
    pictures = PictureSet(held_out_prompts(config), config.seed, evaluation.batch, sampling, evaluation_generator)
    located = locate_prompts(evaluation.prompts_path, config.prompts.column)
    if cut := describe_cut_prompts(policy.text, located, model.max_sequence_length):
        print(f"warning: {cut}", flush=True)
    oracle = (
        replace(pictures, prompts=told_prompts(config, pictures.prompts)) if config.evaluation.draws_oracle else None
    )
    encode = encoder(config, policy, pictures.prompts + (oracle.prompts if oracle else ()))
    yield _BASE, pictures.draw_alone(policy, encode)
    if oracle:
        yield _ORACLE, oracle.draw_alone(policy, encode)
    for name, folder in folders.items():
        if (folder / "policy").is_dir():
            load_checkpoint(policy, folder, config.finetune)
        else:
            policy.load_transformer(folder)
        print(f"drawing {len(pictures.prompts)} pictures with {name}", flush=True)
        yield name, pictures.draw_alone(policy, encode)


def load_checkpoint(policy: Policy, folder: Path, finetune: FinetuneConfig) -> None:
    """Load a checkpoint's weights into the transformer. Raise EvaluateError for one that the run has not made."""
    try:
        weights = checkpoint_weights(folder)
        if finetune.kind == "lora":  # the checkpoint has the adapter alone, and an earlier policy may be loaded
            policy.restore_transformer()
            weights = whole_weights(policy.transformer.state_dict() | weights, finetune)
        policy.transformer.load_state_dict(weights)
    except (ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise EvaluateError(f"{folder} is no checkpoint of this run: {str(error).splitlines()[0]}") from error


def measure(config: RunConfig, measurer: Measurer, policies: Iterator[tuple[str, Tensor]]) -> list[Column]:
    """Return each policy's numbers and its differences from the base model, with intervals from paired draws."""
    prompts, settings = held_out_prompts(config), config.comparison
    seen: dict[str, Measurements] = {}
    for name, images in policies:
        seen[name] = measurer.measure(images, prompts, seen.get(_BASE))
    each = settings.num_images_per_prompt
    draws = list(draws_of_prompts(len(prompts) // each, each, settings.num_draws, config.seed))
    base = _values(measurer, seen[_BASE], draws)
    columns = []
    for name, observed in seen.items():
        values = _values(measurer, observed, draws)
        if _ORACLE in seen and name not in (_BASE, _ORACLE):
            values |= gaps_closed(base, values, _values(measurer, seen[_ORACLE], draws))
        numbers = {key: _interval(column, settings.confidence) for key, column in values.items()}
        differences = {
            key: _interval(column - base[key], settings.confidence) for key, column in values.items() if key in base
        }
        columns.append(Column(name, observed.images, numbers, {} if name == _BASE else differences))
    return columns


def write_report(config: RunConfig, columns: Sequence[Column]) -> tuple[Path, Path]:
    """Write report.html and numbers.json into the run's folder. Return their paths."""
    settings, prompts = config.comparison, held_out_prompts(config)
    trained = " and ".join(reward.name for reward in config.rewards)
    each = settings.num_images_per_prompt
    explained = (
        f"{len(prompts) // each} held-out prompts × {each} pictures, the same noise for every policy. In brackets "
        f"{settings.confidence:.0%} intervals over prompts (paired bootstrap, {settings.num_draws} draws); below a "
        f"number its difference from the base model, bold where the interval excludes 0. The run trains on {trained}."
    )
    folder = config.output_dir / config.name / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        column.name: {
            key: {"value": asdict(value)}
            | ({"difference": asdict(column.differences[key])} if key in column.differences else {})
            for key, value in column.numbers.items()
        }
        for column in columns
    }
    report, table = folder / "report.html", folder / "numbers.json"
    shown = prompts[: config.evaluation.num_grid_images]
    report.write_text(render(f"{config.name}: {_FOLDER}", explained, columns, shown), encoding="utf-8")
    table.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return report, table


def write_viewing(config: RunConfig, columns: Sequence[Column]) -> tuple[Path, ...]:
    """Write the page of a blind viewing of base and first model, and its key, if wanted. Return their paths."""
    settings, prompts = config.comparison, held_out_prompts(config)
    if not settings.num_viewing_pairs:
        return ()
    base = columns[0]
    model = next(column for column in columns if column.name not in (_BASE, _ORACLE))
    rows = choose_rows(len(prompts), settings.num_viewing_pairs, config.seed)
    truth = truth_of(config, {prompts[row] for row in rows}) or {}
    pairs = [Pair(prompts[row], base.images[row], model.images[row], truth.get(prompts[row])) for row in rows]
    page, key = render_viewing(f"{config.name}: blind viewing", pairs, config.seed)
    folder = config.output_dir / config.name / _FOLDER
    paths = folder / "viewing.html", folder / "viewing_key.json"
    paths[0].write_text(page, encoding="utf-8")
    paths[1].write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def held_out_prompts(config: RunConfig) -> tuple[str, ...]:
    """Return a prompt for each picture."""
    labels = load_prompts(config.evaluation.prompts_path, config.prompts.column)
    return tuple(label for label in labels for _ in range(config.comparison.num_images_per_prompt))


def _values(measurer: Measurer, seen: Measurements, draws: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return, by name, (1 + num_draws,): each number on all prompts, then on each draw of them."""
    rows = [measurer.summarize(seen), *(measurer.summarize(seen.rows(draw)) for draw in draws)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def _interval(values: Tensor, confidence: float) -> Interval:
    return interval(float(values[0]), values[1:], confidence)


def _flat(column: Column) -> Iterator[tuple[str, float]]:
    for kind, numbers in (("", column.numbers), ("_difference", column.differences)):
        for name, value in numbers.items():
            for end, number in asdict(value).items():
                yield f"{column.name}/{name}{kind}" + ("" if end == "value" else f"_{end}"), number


def _device(config: RunConfig) -> torch.device:
    return torch.device("cuda" if config.engine.use_gpu else "cpu")


if __name__ == "__main__":
    sys.exit(main())
