"""Evaluate the policy on held-out prompts, log sample images, and summarize a run as before and after."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from services.clients.tracking import Tracker
from trainer.evaluation.drawing import Evaluation
from trainer.evaluation.grids import before_after, picture_grid
from trainer.evaluation.paired import paired_values
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.similarities import similarities
from trainer.runtime.worker import Worker

_NUM_GRID_COLUMNS = 6


class Evaluator:
    """Draws on all workers, which call every method together. Worker 0 judges, writes files and records."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._config, self._pictures = worker, worker.config, worker.pictures

    def evaluate(self, policy_name: str, step: int) -> None:
        """Draw the held-out prompts, judge the images, and save images and numbers under the policy's name."""
        worker = self._worker
        with worker.seconds.timed(f"{policy_name}_evaluation"):
            images = worker.draw(self._pictures, len(self._pictures.prompts))
            if images is None:
                return
            evaluation = Evaluation(images, self._judge(images))
            worker.folder.mkdir(parents=True, exist_ok=True)
            evaluation.save(self._path(policy_name))
            worker.log(lambda tracker: tracker.log_metrics(evaluation.numbers, step))
            worker.log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))
            print(f"{policy_name}:", *(f"{key} {value:.3f}" for key, value in evaluation.numbers.items()), flush=True)

    def show_samples(self, step: int) -> None:
        """Log a grid of held-out images where one is due. The final evaluation logs the last step's."""
        worker, config = self._worker, self._config
        if step % config.evaluation.every_num_steps or step == config.num_steps:
            return
        with worker.seconds.timed("sample_grids"):
            images = worker.draw(self._pictures, worker.num_grid_images)
        if images is not None:
            worker.log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))

    def summarize(self) -> None:
        """Write the run's numbers and a picture of before and after on worker 0, and finish its record."""
        worker = self._worker
        if not worker.is_recording:
            return
        base, aligned = (Evaluation.load(self._path(name)) for name in ("base", "aligned"))
        guard = worker.guard and {"exported_step": worker.guard.exported_step, "stopped_by": worker.guard.broken_rule}
        summary = {
            "base": base.numbers,
            "aligned": aligned.numbers,
            "num_images": len(base.images),
            "guard": guard,
            "seconds": worker.seconds.seconds,
        }
        files = worker.folder / "evaluation.json", worker.folder / "before_after.png"
        files[0].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shown = slice(worker.num_grid_images)
        before_after(base.images[shown], aligned.images[shown], self._pictures.prompts[shown]).save(files[1])
        for file in files:
            worker.log(partial(Tracker.log_file, path=file))
        worker.close_record()

    def _judge(self, images: Tensor) -> dict[str, float]:
        judges, prompts = self._worker.judges, self._pictures.prompts
        numbers = judges.numbers(images, prompts, self._config.evaluation.batch) if judges else {}
        return numbers | self._distances_to_truth(images) | self._mean_rewards(images)

    def _distances_to_truth(self, images: Tensor) -> dict[str, float]:
        """Return the means of the paired measures, if the run has real pictures of its prompts."""
        prompts = self._pictures.prompts
        if (truth := truth_of(self._config, set(prompts))) is None:
            return {}
        values = paired_values(images, torch.stack([truth[prompt] for prompt in prompts]))
        return {f"eval/{name}": float(value.mean()) for name, value in values.items()}

    def _mean_rewards(self, images: Tensor) -> dict[str, float]:
        """Return the weighted sum as eval/reward, and also each reward's mean if there are several."""
        config, means = self._config, {}
        for reward in config.rewards:
            positive, negative = similarities(self._worker.client, config, reward.name, images, self._pictures.prompts)
            means[reward.name] = float((positive - negative).mean())
        total = sum(reward.weight * means[reward.name] for reward in config.rewards)
        each = {f"eval/reward_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
        return each | {"eval/reward": total}

    def _grid(self, images: Tensor) -> PIL.Image.Image:
        num_shown = self._worker.num_grid_images
        return picture_grid(images[:num_shown], self._pictures.prompts[:num_shown], _NUM_GRID_COLUMNS)

    def _path(self, policy_name: str) -> Path:
        return self._worker.folder / f"{policy_name}.safetensors"
