"""The training loop on one screen, and what each of its verbs does on a worker.

All workers make the same calls in the same order. What is recorded is the mean over all of them; worker 0 records it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import PIL.Image
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.clients.reward import RewardClient
from services.clients.tracking import Tracker
from services.config.run import RunConfig
from services.contract import Float32, PromptPair, RewardRequest, RewardResponse, WeightedReward
from trainer.algorithm.baselines import make_learner
from trainer.algorithm.direct_align_learner import num_backwards
from trainer.algorithm.learner import worker_samples
from trainer.algorithm.step_metrics import StepMetrics, progress_line
from trainer.data.batches import open_batches
from trainer.data.conditioning import drawn_prompts, encoder, load_policy, used_prompts
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.evaluation.drawing import (
    Evaluation,
    HeldOut,
    Judges,
    before_after,
    held_out_images,
    picture_grid,
    similarities,
)
from trainer.evaluation.guard import Watch, guard_panel
from trainer.evaluation.stop_rules import BEST_STEP
from trainer.model.engine import Engine, init_distributed
from trainer.model.lora import adapter, add_adapter, whole
from trainer.runtime.recorder import Recorder
from trainer.runtime.steering import Helm, try_out

_GRID_COLUMNS = 6


def train_worker(config: RunConfig, run_id: str) -> None:
    """One worker's part of a run, started by Ray Train on each; `run_id` is the MLflow run, opened by launch.py."""
    run = Worker(config, run_id)
    first_step = run.resume()
    if first_step == 0:
        run.warn()
        run.evaluate("base", step=0)
        run.check(step=0)
    for step in range(first_step, config.num_steps):
        if run.must_stop():
            break
        run.steer()
        with run.step_timed():
            for injections in run.learner.roll_out(step):
                for injection in injections:
                    run.learner.learn(injection)
                run.learner.update()
        run.record(step + 1)
        run.check(step + 1)
        run.keep_checkpoint(step + 1)
        run.show_samples(step + 1)
    run.evaluate("aligned", step=run.take_best())
    run.export()
    run.summarise()


class Worker:
    """What a worker holds between steps. The public methods, and the learner's, are the verbs of the loop."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        self.config = config
        logging.getLogger().setLevel(logging.WARNING)  # Ray sets INFO: a line for every request and every report
        self._total = StepMetrics()  # seconds by phase, of the whole run
        with self._total.timed("load"):
            torch.set_num_threads(config.engine.threads_per_worker)
            self._device = init_distributed(config.engine.use_gpu)
            self._rank, self._num_workers = dist.get_rank(), dist.get_world_size()
            tracker = Tracker.resume(config.tracking.uri, run_id) if self._rank == 0 else None
            self._recorder = Recorder(tracker) if tracker else None
            self._folder = config.output_dir / config.name
            self._load_model()
            self._load_rewards()
            self._encode_prompts()
            self.learner = make_learner(config, self._engine, self._policy, self._score, self._encoded)
            drawn = drawn_prompts(config) if tracker else []
            self._helm = Helm(config, self._device, tracker, self._log, partial(try_out, self._client, drawn))

    def _load_model(self) -> None:
        config, engine = self.config, self.config.engine
        dtype = getattr(torch, config.model.dtype)
        self._policy = load_policy(config, self._device, gradient_checkpointing=engine.gradient_checkpointing)
        if config.finetune.kind == "lora":
            add_adapter(self._policy.transformer, config.finetune, config.seed)
        num_trained = sum(each.numel() for each in self._policy.transformer.parameters() if each.requires_grad)
        self._log(lambda tracker: tracker.set_tag("num_trained_parameters", str(num_trained)))
        backwards = num_backwards(config)
        self._engine = Engine.create(self._policy.transformer, config.optimizer, engine, backwards, dtype, config.ema)
        self._policy = self._policy.calling(self._engine.transformer)
        shift = self._policy.resolve_shift(config.rollout.shift, config.model.height_px, config.model.width_px)
        self._held_out = held_out_images(config, shift)

    def _load_rewards(self) -> None:
        config = self.config
        service = config.reward_service
        self._client = RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts)
        judge_path = config.evaluation.judge_path
        self._judges = Judges.load(judge_path, self._device) if judge_path and self._rank == 0 else None
        guard, self._watch = config.guard, None
        if guard is not None:
            panel = guard_panel(config, guard, self._client, self._judges) if self._rank == 0 else None
            self._watch = Watch(config, guard, self._held_out.sampling, panel, self._device)

    def _encode_prompts(self) -> None:
        """Of all that this worker will draw, the conditioning: encoded now, or found on disk."""
        config, worker = self.config, (self._rank, self._num_workers)
        batches, steps = open_batches(config), range(config.num_steps)
        indices = worker_samples(config, *worker)
        wanted = [batches.batch(step).prompts[index] for step in steps for index in indices]
        drawn = [(self._held_out, len(self._held_out.prompts)), (self._held_out, self._num_grid_images)]
        if self._watch is not None:
            drawn.append((self._watch.pictures, len(self._watch.pictures.prompts)))
        for pictures, num_images in drawn:
            wanted += [pictures.prompts[index] for index in pictures.shard(num_images, *worker)]
        self._encoded = encoder(config, self._policy, wanted)

    def resume(self) -> int:
        """The number of steps taken: 0, or the last checkpoint's where Ray Train has restarted the workers."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            self._helm.load(Path(folder))
            if self._watch is not None:
                self._watch.load(Path(folder))
            return self._engine.load(Path(folder))

    def warn(self) -> None:
        """Say, in print and as a tag, which prompts the encoders cut."""
        if self._recorder is None:
            return
        if cut := describe_cut_prompts(
            self._policy.text, used_prompts(self.config), self.config.model.max_sequence_length
        ):
            print(f"warning: {cut}", flush=True)
            self._log(lambda tracker: tracker.set_tag("warning_long_prompts", cut))

    def evaluate(self, policy_name: str, step: int) -> None:
        """Draw the held-out prompts and judge the images; keep both under the policy's name."""
        with self._total.timed(f"{policy_name}_evaluation"):
            images = self._draw(self._held_out, len(self._held_out.prompts))
            if images is None:
                return
            evaluation = Evaluation(images, self._judge(images))
            self._folder.mkdir(parents=True, exist_ok=True)
            evaluation.save(self._evaluation_path(policy_name))
            self._log(lambda tracker: tracker.log_metrics(evaluation.numbers, step))
            self._log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))
            print(f"{policy_name}:", *(f"{key} {value:.3f}" for key, value in evaluation.numbers.items()), flush=True)

    def steer(self) -> None:
        """Take the words, scales and weights that the MLflow run asks for, on all workers at once."""
        with self.learner.numbers.timed("steer"):
            self._helm.turn()
        self.learner.follow(self._helm.config)
        self.learner.numbers.add("steering_version", self._helm.in_force.version)

    def step_timed(self) -> AbstractContextManager[None]:
        return self.learner.numbers.timed("step")

    def record(self, step: int) -> None:
        """Print and log the mean over all workers; `step` counts the steps taken."""
        numbers = self.learner.numbers.mean_over_workers(self._device)
        self.learner.numbers = StepMetrics()
        self._total.add_seconds("steps", numbers["seconds_step"])
        if self._recorder is not None:
            print(progress_line(step, self.config.num_steps, numbers), flush=True)
        self._log(lambda tracker: tracker.log_metrics(numbers, step))

    def check(self, step: int) -> None:
        """Let the guard see the policy where a check is due; the base model's weights are kept as any best ones."""
        if self._watch is None or not self._watch.is_due(step):
            return
        with self._total.timed("guard"):
            images = self._draw(self._watch.pictures, len(self._watch.pictures.prompts))
            numbers = self._watch.check(step, images)
        self._log(lambda tracker: tracker.log_metrics(numbers, step))
        if step == 0:
            self._save_checkpoint(step)

    def must_stop(self) -> bool:
        """Whether the guard's last check ends the run, on all workers alike."""
        return self._watch is not None and self._watch.broken_rule is not None

    def keep_checkpoint(self, step: int) -> None:
        """Hand Ray Train what `resume` needs, at the configured steps and after the last one; and the guard's best."""
        is_due = step % self.config.checkpoint.every_num_steps == 0 or step == self.config.num_steps
        if is_due or (self._watch is not None and self._watch.is_best(step)):
            self._save_checkpoint(step)

    def take_best(self) -> int:
        """Go back to the weights that are the run's result. Returns their step; the MLflow run says why it is this."""
        if self._watch is None:
            return self.config.num_steps
        step, reason = self._watch.exported_step, self._watch.broken_rule
        if reason is not None:
            self._log(lambda tracker: tracker.set_tag("stopped_by", reason))
        self._log(lambda tracker: tracker.set_tag("exported_step", str(step)))
        if self._recorder is not None:
            print(f"guard: {reason or 'no rule was broken'}; the result is step {step}'s", flush=True)
        if step != self._watch.last_step:
            kept = {each.metrics["step"]: each.checkpoint for each in ray.train.get_all_reported_checkpoints()}
            with kept[step].as_directory() as folder:
                self._engine.load(Path(folder))
        return step

    def show_samples(self, step: int) -> None:
        """Log a grid of held-out images; the last step's grid is the final evaluation's."""
        if step % self.config.evaluation.every_num_steps or step == self.config.num_steps:
            return
        with self._total.timed("sample_grids"):
            images = self._draw(self._held_out, self._num_grid_images)
        if images is not None:
            self._log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))

    def export(self) -> None:
        """Write the aligned model as a folder that FluxPipeline loads, and the adapter alone where there is one."""
        with self._total.timed("export"):
            self._engine.export(self._write_model)
        for name in ("model", "adapter") if self.config.finetune.kind == "lora" else ("model",):
            self._log(partial(Tracker.log_model_folder, folder=self._folder / name, name=name))

    def summarise(self) -> None:
        """Worker 0 writes before and after, as numbers and as a picture, and ends its record."""
        if self._recorder is None:
            return
        base, aligned = (Evaluation.load(self._evaluation_path(name)) for name in ("base", "aligned"))
        guard = self._watch and {"exported_step": self._watch.exported_step, "stopped_by": self._watch.broken_rule}
        summary = {
            "base": base.numbers,
            "aligned": aligned.numbers,
            "num_images": len(base.images),
            "guard": guard,
            "seconds": self._total.seconds,
        }
        files = self._folder / "evaluation.json", self._folder / "before_after.png"
        files[0].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shown = slice(self._num_grid_images)
        before_after(base.images[shown], aligned.images[shown], self._held_out.prompts[shown]).save(files[1])
        for file in files:
            self._recorder.log(partial(Tracker.log_file, path=file))
        self._recorder.close()

    def _save_checkpoint(self, step: int) -> None:
        with tempfile.TemporaryDirectory() as folder, self._total.timed("checkpoints"):
            self._engine.save(Path(folder), step)
            if self._rank == 0:
                self._helm.save(Path(folder))
            metrics = {"step": step}
            if self._watch is not None:
                metrics[BEST_STEP] = step if self._watch.is_best(step) else -1
                if self._rank == 0:
                    self._watch.save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    @property
    def _num_grid_images(self) -> int:
        return min(self.config.evaluation.num_grid_images, len(self._held_out.prompts))

    def _score(
        self,
        reward: str,
        images: Float32,
        pairs: tuple[PromptPair, ...],
        scales: tuple[float, ...],
        with_gradient: bool,
    ) -> RewardResponse:
        return self._client.score(RewardRequest(images, pairs, scales, (WeightedReward(reward),), with_gradient))

    def _write_model(self, policy: nn.Module) -> None:
        self._policy.save_pipeline(whole(policy, self.config.finetune), self._folder / "model")
        if self.config.finetune.kind == "lora":
            self._policy.save_adapter(*adapter(policy), self._folder / "adapter")

    def _draw(self, pictures: HeldOut, num_images: int) -> Tensor | None:
        with self._engine.averaged():
            return pictures.draw(self._policy, self._encoded, num_images)

    def _judge(self, images: Tensor) -> dict[str, float]:
        prompts, batch = self._held_out.prompts, self.config.evaluation.batch
        judged = self._judges.numbers(images, prompts, batch) if self._judges else {}
        return judged | self._mean_rewards(images)

    def _mean_rewards(self, images: Tensor) -> dict[str, float]:
        """eval/reward is the weighted sum; where there are several, each has its own number beside it."""
        means = {}
        for reward in self.config.rewards:
            positive, negative = similarities(self._client, self.config, reward.name, images, self._held_out.prompts)
            means[reward.name] = float((positive - negative).mean())
        total = sum(reward.weight * means[reward.name] for reward in self.config.rewards)
        each = {f"eval/reward_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
        return each | {"eval/reward": total}

    def _grid(self, images: Tensor) -> PIL.Image.Image:
        num_shown = self._num_grid_images
        return picture_grid(images[:num_shown], self._held_out.prompts[:num_shown], _GRID_COLUMNS)

    def _evaluation_path(self, policy_name: str) -> Path:
        return self._folder / f"{policy_name}.safetensors"

    def _log(self, write: Callable[[Tracker], None]) -> None:
        if self._recorder is not None:
            self._recorder.log(write)
