"""Evaluate the policy on held-out prompts, log sample images, and summarize a run as before and after."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from services.clients.spool import Spool
from trainer.draws import draw_rows
from trainer.evaluation.drawing import Evaluation, PictureSet
from trainer.evaluation.grids import picture_grid, side_by_side
from trainer.evaluation.measurements import Measurements, Measurer
from trainer.evaluation.paired import gaps_closed
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.shared_measurer import SharedMeasurer
from trainer.evaluation.similarities import measures_of, reward_metrics
from trainer.runtime.agreement import holds_everywhere
from trainer.runtime.worker import Worker

_NUM_GRID_COLUMNS, _NUM_COLUMNS_SIDE_BY_SIDE = 6, 4


class Evaluator:
    """Draws and measures on all workers, which call every method together. Worker 0 writes files and records."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config, self._pictures = worker, worker.config, worker.pictures
        self._measurer = SharedMeasurer(self._pictures, self._make_measurer(), self._path("base"))

    def evaluate_base(self) -> None:
        """Evaluate the base model, and the oracle if evaluation.draws_oracle says so, unless an attempt before has."""
        sets = {"base": self._pictures, "oracle": self._worker.oracle_pictures}
        for name, pictures in sets.items():
            is_done = holds_everywhere(self._path(name).is_file(), self._worker.device)  # the folder may be slow
            if pictures is not None and not is_done:
                self._evaluate(name, pictures, step=0)

    def evaluate_aligned(self, step: int) -> None:
        """Evaluate the aligned model, whose weights are those of `step`."""
        self._evaluate("aligned", self._pictures, step)

    def show_samples(self, step: int) -> None:
        """Log a grid of held-out images where one is due. The final evaluation logs the last step's."""
        worker, config = self._worker, self._config
        if step == 0 or step % config.evaluation.every_num_steps or step == config.num_steps:
            return
        with worker.seconds.timed("sample_grids"):
            images = worker.draw(self._pictures, worker.num_grid_images)
        if images is not None:
            worker.log(lambda record: record.log_image(self._grid(images), "samples", step))

    def summarize(self) -> None:
        """Write the run's numbers and a picture of before and after on worker 0, and finish its record."""
        worker = self._worker
        if not worker.is_recording:
            return
        names = ("base", "oracle", "aligned") if worker.oracle_pictures else ("base", "aligned")
        guard = worker.guard and {"exported_step": worker.guard.exported_step, "stopped_by": worker.guard.broken_rule}
        summary = {
            **{name: self._load(name).numbers for name in names},
            "num_images": len(self._pictures.prompts),
            "guard": guard,
            "seconds": worker.seconds.seconds,
        }
        files = worker.folder / "evaluation.json", worker.folder / "before_after.png"
        files[0].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self._before_after().save(files[1])
        for file in files:
            worker.log(partial(Spool.log_file, path=file))

    def _evaluate(self, name: str, pictures: PictureSet, step: int) -> None:
        """Draw the held-out prompts, measure the images, and save images and numbers under the policy's name."""
        worker = self._worker
        with worker.seconds.timed(f"{name}_evaluation"):
            with worker.engine.averaged():
                measurements = self._measurer.measure(worker.drawing(pictures), of_base=name == "base")
            if measurements is None:
                return
            worker.folder.mkdir(parents=True, exist_ok=True)
            images, numbers = measurements.images, self._numbers(measurements)
            if name == "aligned" and worker.oracle_pictures:
                numbers |= self._gaps_closed(numbers)
            group, title = ("oracle", "oracle") if name == "oracle" else ("eval", "samples")
            recorded = {f"{group}/{key}": value for key, value in numbers.items()}
            worker.log(lambda record: record.log_metrics(group, recorded, step))
            worker.log(lambda record: record.log_image(self._grid(images), title, step))
            Evaluation(images, {f"eval/{key}": value for key, value in numbers.items()}).save(self._path(name))
            print(f"{name}:", *(f"{key} {value:.3f}" for key, value in sorted(numbers.items())), flush=True)

    def _make_measurer(self) -> Measurer:
        worker, config, evaluation = self._worker, self._config, self._config.evaluation
        rewards = measures_of(worker.client, config, reward_metrics(config))
        truth, repeats = truth_of(config, self._pictures.own_prompts()), evaluation.num_images_per_prompt
        return Measurer(rewards, worker.judges, evaluation.reference_path, repeats, truth, evaluation.batch)

    def _numbers(self, measurements: Measurements) -> dict[str, float]:
        """Return every number of a policy's images; of several rewards also their weighted sum, as reward."""
        numbers, rewards = self._measurer.summarize(measurements), self._config.rewards
        if len(rewards) > 1:
            numbers["reward"] = sum(each.weight * numbers[f"reward_{each.name}"] for each in rewards)
        return numbers

    def _gaps_closed(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return where the aligned model stands between the base (0) and the oracle (1), by paired measure."""
        found = [
            {key.removeprefix("eval/"): torch.tensor(value, dtype=torch.float64) for key, value in each.items()}
            for each in (self._load("base").numbers, numbers, self._load("oracle").numbers)
        ]
        return {key: float(value) for key, value in gaps_closed(*found).items()}

    def _before_after(self) -> PIL.Image.Image:
        """Return images of base, aligned and, if there are some, real pictures side by side; the seed draws which."""
        prompts = self._pictures.prompts
        rows = draw_rows(self._config.seed, len(prompts), self._worker.num_grid_images)
        columns = [self._load(name).images[rows] for name in ("base", "aligned")]
        shown = [prompts[row] for row in rows]
        if (truth := truth_of(self._config, shown)) is not None:
            columns.append(torch.stack([truth[prompt] for prompt in shown]))
        return side_by_side(columns, shown, _NUM_COLUMNS_SIDE_BY_SIDE)

    def _grid(self, images: Tensor) -> PIL.Image.Image:
        num_shown = self._worker.num_grid_images
        return picture_grid(images[:num_shown], self._pictures.prompts[:num_shown], _NUM_GRID_COLUMNS)

    def _load(self, policy_name: str) -> Evaluation:
        return Evaluation.load(self._path(policy_name))

    def _path(self, policy_name: str) -> Path:
        return self._worker.folder / f"{policy_name}.safetensors"
