"""Run one task in one process of one thread: train for so many CPU-seconds, judge, write numbers and pictures.

    python -m deploy.bench_method.one_run TASK.json OUT_FOLDER

The pieces are those of a training under Ray (Policy, Engine, the learner, Judges, Measurer); the reward is scored in
this process by the service's own Scorer, so that its CPU-seconds count. OUT_FOLDER/NAME.json is written last.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# before torch and DeepSpeed read them
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}

import torch
from safetensors.torch import save_file

from deploy.bench_method.plan import Task
from deploy.settings import ROOT, free_port
from reward_server.models import ClipArgs
from reward_server.scoring.scorer import Job, Scorer
from services.contract import Float32, PromptPair, RewardRequest, RewardResponse, WeightedReward
from trainer.algorithm.methods import make_learner, num_backwards
from trainer.algorithm.step_metrics import StepMetrics, progress_line
from trainer.data.batches import open_batches
from trainer.data.conditioning import encode_ahead
from trainer.data.run_prompts import told_prompts
from trainer.evaluation.drawing import PictureSet, evaluation_pictures
from trainer.evaluation.judges import Judges
from trainer.evaluation.measurements import Measurer
from trainer.evaluation.real_pictures import truth_of
from trainer.evaluation.similarities import measures_of, reward_metrics
from trainer.model.engine import Engine, init_distributed
from trainer.model.lora import add_adapter
from trainer.model.policy import Policy

_REWARD_PATH = ROOT / "deploy" / "tiny" / "reward"


class InProcess:
    """Scores with the embedded reward in this process, without a service."""

    def __init__(self, names: Sequence[str]) -> None:
        self._scorer = Scorer({name: ClipArgs(kind="clip", path=str(_REWARD_PATH)) for name in names})

    def score(self, request: RewardRequest) -> RewardResponse:
        (answer,) = self._scorer.score([Job(request, request.rewards[0].name, request_id="bench")])
        if not isinstance(answer, RewardResponse):
            raise answer
        return answer

    def __call__(
        self, name: str, images: Float32, pairs: tuple[PromptPair, ...], scales: tuple[float, ...], with_gradient: bool
    ) -> RewardResponse:
        return self.score(RewardRequest(images, pairs, scales, (WeightedReward(name),), with_gradient))


class Run:
    """Everything that a task needs, loaded."""

    def __init__(self, task: Task) -> None:
        config = task.config
        self.task, self.cpu_s, self.num_steps = task, 0.0, 0
        self._device = init_distributed(use_gpu=False)
        self._reward = InProcess([reward.name for reward in config.rewards])
        self._policy = Policy.load(config.model.path, torch.float32)
        if config.finetune.kind == "lora":
            add_adapter(self._policy.transformer, config.finetune, config.seed)
        self._engine = Engine.create(
            self._policy.transformer, config.optimizer, config.engine, num_backwards(config, 1), torch.float32
        )
        self._pictures = self._held_out()
        prompts = [*(each.prompt for each in open_batches(config).located), *self.prompts]
        self._encode = encode_ahead(self._policy, prompts, config.model.max_sequence_length)
        self._learner = make_learner(config, self._engine, self._policy, self._reward, self._encode)
        self._judges = self._load_judges()
        rewards = measures_of(self._reward, config, reward_metrics(config))
        truth, repeats = truth_of(config, set(self.prompts)), config.evaluation.num_images_per_prompt
        self._measurer = Measurer(rewards, self._judges, None, repeats, truth)
        self._base = self._measurer.measure(self.draw(), self.prompts)

    def train_until(self, cpu_s: float) -> None:
        """Take optimizer steps until they have used so many CPU-seconds. Raise ValueError if a loss is not finite."""
        while self.cpu_s < cpu_s:
            began, wall = time.process_time(), time.perf_counter()
            for materials in self._learner.roll_out(self.num_steps):
                for material in materials:
                    self._learner.learn(material)
                self._learner.update()
            self.cpu_s += time.process_time() - began
            self.num_steps += 1
            self._learner.metrics.add_seconds("step", time.perf_counter() - wall)
            numbers = self._learner.metrics.mean_over_workers(self._device)
            self._learner.metrics = StepMetrics()
            print(f"{self.cpu_s:6.1f} CPU-s ", progress_line(self.num_steps, 0, numbers), flush=True)
            if not math.isfinite(numbers["loss"]):
                raise ValueError(f"step {self.num_steps}: the loss is {numbers['loss']}")

    def judge(self) -> tuple[dict[str, float], torch.Tensor]:
        """Return the numbers of the policy as it is, and its pictures (num_images, 3, height, width) uint8."""
        images = self.draw()
        return self._numbers(images), images

    def judge_oracle(self) -> dict[str, float]:
        """Return the numbers of the policy's pictures of the prompts under the positive control word."""
        return self._numbers(self.draw(told_prompts(self.task.config, self.prompts)))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the held-out prompt of each picture."""
        return self._pictures.prompts

    def draw(self, prompts: tuple[str, ...] | None = None) -> torch.Tensor:
        """Draw the held-out prompts, or others from the same noise: (num_images, 3, height, width) uint8."""
        if prompts is None:
            return self._pictures.draw_alone(self._policy, self._encode)
        encode = encode_ahead(self._policy, prompts, self.task.config.model.max_sequence_length)
        return replace(self._pictures, prompts=prompts).draw_alone(self._policy, encode)

    def _numbers(self, images: torch.Tensor) -> dict[str, float]:
        return self._measurer.summarize(self._measurer.measure(images, self.prompts, self._base))

    def _held_out(self) -> PictureSet:
        model = self.task.config.model
        shift = self._policy.resolve_shift(self.task.config.rollout.shift, model.height_px, model.width_px)
        return evaluation_pictures(self.task.config, shift)

    def _load_judges(self) -> Judges:
        path = self.task.config.evaluation.judge_path
        if path is None:
            raise ValueError(f"{self.task.name}: evaluation.judge_path is missing, and methods are judged by judges")
        return Judges.load(path, self._device)


def run_task(task: Task, out: Path) -> dict[str, Any]:
    """Train and judge; of a run that fails, keep the error and the checks before it."""
    run = Run(task)
    checks: list[dict[str, Any]] = []
    oracle = run.judge_oracle() if task.config.evaluation.draws_oracle else None
    error = None
    for cpu_s in task.checks_at_cpu_s:
        try:
            run.train_until(cpu_s)
            numbers, images = run.judge()
        except ValueError as broken:
            error = str(broken)
            break
        checks.append({"cpu_s": run.cpu_s, "num_steps": run.num_steps, "numbers": numbers})
        save_file({"images": images}, out / f"{task.name}.safetensors")
    return {"task": json.loads(task.model_dump_json()), "checks": checks, "oracle": oracle, "error": error}


def main(arguments: Sequence[str]) -> int:
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    task_file, out = map(Path, arguments)
    task = Task.model_validate_json(task_file.read_text(encoding="utf-8"))
    result = run_task(task, out)
    unfinished = out / f"{task.name}.unfinished"
    unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    unfinished.rename(out / f"{task.name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
