"""The training loop on one screen, and what each of its verbs does on a worker.

All workers make the same calls in the same order. What is recorded is the mean over all of them; worker 0 records it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import PIL.Image
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from services.config import RunConfig
from services.contract import Float32, PromptPair, RewardRequest, RewardResponse, WeightedReward
from services.reward_client import RewardClient
from services.tracking import Tracker
from trainer.direct_align import branch_loss
from trainer.engine import Engine, init_distributed
from trainer.evaluate import Evaluation, HeldOut, Judges, before_after, picture_grid
from trainer.flow import branches
from trainer.flux import Conditioning, FluxModel
from trainer.prompts import batch_indices, draw_level, load_prompts, noise_generator, shard
from trainer.record import Journal, StepNumbers, progress_line
from trainer.rollout import Rollout, Sampling, roll_out

_NUM_BRANCHES = 2
_ENCODE_BATCH = 32
_GRID_COLUMNS = 6
# eval/reward is the plain difference of the two similarities: a scale above 0 would reward the subject as well
_EVALUATION_PREFERENCE_SCALE = 0.0


def train_worker(config: RunConfig, run_id: str) -> None:
    """One worker's part of a run, started by Ray Train on each; `run_id` is the MLflow run, opened by launch.py."""
    run = Worker(config, run_id)
    first_step = run.resume()
    if first_step == 0:
        run.evaluate("base", step=0)
    for step in range(first_step, config.num_steps):
        with run.step_timed():
            for rollout in run.roll_out(step):
                run.learn(rollout)
            run.update()
        run.record(step + 1)
        run.keep_checkpoint(step + 1)
        run.show_samples(step + 1)
    run.evaluate("aligned", step=config.num_steps)
    run.export()
    run.summarise()


class Worker:
    """What a worker holds between steps. The public methods are the verbs of the loop, in its order."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        self.config = config
        logging.getLogger().setLevel(logging.WARNING)  # Ray sets INFO: a line for every request and every report
        self._total = StepNumbers()  # seconds by phase, of the whole run
        with self._total.timed("load"):
            torch.set_num_threads(config.engine.threads_per_worker)
            self._device = init_distributed(config.engine.use_gpu)
            self._rank, self._num_workers = dist.get_rank(), dist.get_world_size()
            self._journal = Journal(Tracker.resume(config.tracking.uri, run_id)) if self._rank == 0 else None
            self._folder = config.output_dir / config.name
            self._step = StepNumbers()
            self._load_model()
            self._load_rewards()
            self._encode_prompts()

    def _load_model(self) -> None:
        config, engine = self.config, self.config.engine
        dtype = getattr(torch, config.model.dtype)
        checkpointing = engine.gradient_checkpointing
        self._flux = FluxModel.load(config.model.path, dtype, self._device, gradient_checkpointing=checkpointing)
        num_backwards = _NUM_BRANCHES * engine.num_micro_batches
        self._engine = Engine.create(self._flux.transformer, config.optimizer, engine, num_backwards, dtype)
        size = config.model.height_px, config.model.width_px
        self._shift = self._flux.resolve_shift(config.rollout.shift, *size)
        self._sampling = Sampling(config.rollout.num_steps, config.rollout.guidance_scale, self._shift, *size)
        self._held_out = held_out_images(config, self._shift)

    def _load_rewards(self) -> None:
        config = self.config
        reward = config.reward
        self._client = RewardClient(reward.url, timeout_s=reward.timeout_s, max_attempts=reward.max_attempts)
        self._rewards = (WeightedReward(config.reward.name),)
        judge_path = config.evaluation.judge_path
        self._judges = Judges.load(judge_path, self._device) if judge_path and self._rank == 0 else None

    def _encode_prompts(self) -> None:
        """Encode all that this worker will draw; the text encoders are not needed again."""
        config = self.config
        self._prompts = load_prompts(config.prompts.path)
        wanted = [prompt for step in range(config.num_steps) for _, prompt in self._samples(step)]
        for num_images in (len(self._held_out.prompts), self._num_grid_images):
            indices = self._held_out.shard(num_images, self._rank, self._num_workers)
            wanted += [self._held_out.prompts[index] for index in indices]
        self._encoded = encode_ahead(self._flux, wanted, config.model.max_sequence_length)
        self._flux.drop_text_encoders()

    def resume(self) -> int:
        """The number of steps taken: 0, or the last checkpoint's where Ray Train has restarted the workers."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            return self._engine.load(Path(folder))

    def evaluate(self, policy_name: str, step: int) -> None:
        """Draw the held-out prompts and judge the images; keep both under the policy's name."""
        with self._total.timed(f"{policy_name}_evaluation"):
            images = self._draw_held_out(len(self._held_out.prompts))
            if images is None:
                return
            evaluation = Evaluation(images, self._judge(images))
            self._folder.mkdir(parents=True, exist_ok=True)
            evaluation.save(self._evaluation_path(policy_name))
            self._log(lambda tracker: tracker.log_metrics(evaluation.numbers, step))
            self._log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))
            print(f"{policy_name}:", *(f"{key} {value:.3f}" for key, value in evaluation.numbers.items()), flush=True)

    def step_timed(self) -> AbstractContextManager[None]:
        return self._step.timed("step")

    def roll_out(self, step: int) -> Iterator[Rollout]:
        """This worker's share of the step's prompts, a micro-batch at a time, rolled out when the loop asks for it."""
        config, samples = self.config, self._samples(step)
        for start in range(0, len(samples), config.engine.micro_batch):
            indices, prompts = zip(*samples[start : start + config.engine.micro_batch], strict=True)
            generators = [noise_generator(config.seed, step, index) for index in indices]
            levels = [draw_level(config.seed, step, index, config.objective.level_range) for index in indices]
            noise = self._flux.draw_noise(generators, config.model.height_px, config.model.width_px)
            with self._step.timed("rollout"):
                rollout = roll_out(
                    self._engine.policy,
                    self._flux,
                    self._encoded(prompts),
                    noise,
                    self._pairs(prompts),
                    torch.tensor(levels),
                    self._sampling,
                )
            yield rollout

    def learn(self, rollout: Rollout) -> None:
        """Both branches of a rollout, each one's backward before the next one's forward (Engine.backward says why)."""
        for branch in branches(rollout.levels, self.config.objective, self._shift):
            with self._step.timed("branches"):
                outcome = branch_loss(
                    branch, rollout, self._engine.policy, self._flux, self._score, self.config.objective
                )
                self._engine.backward(outcome.loss)
            self._step.add("loss", outcome.loss)
            self._step.add(f"reward_{branch.name}", outcome.rewards)
            self._step.add(f"preference_scale_{branch.name}", branch.preference_scale)
            self._step.add(f"recovery_weight_{branch.name}", branch.recovery_weight)
            self._step.add_seconds("reward", outcome.seconds_reward)

    def update(self) -> None:
        with self._step.timed("update"):
            self._step.add("grad_norm", self._engine.step())

    def record(self, step: int) -> None:
        """Print and log the mean over all workers; `step` counts the steps taken."""
        numbers = self._step.mean_over_workers(self._device)
        self._step = StepNumbers()
        self._total.add_seconds("steps", numbers["seconds_step"])
        if self._journal is not None:
            print(progress_line(step, self.config.num_steps, numbers), flush=True)
        self._log(lambda tracker: tracker.log_metrics(numbers, step))

    def keep_checkpoint(self, step: int) -> None:
        """Hand Ray Train what `resume` needs, at the configured steps and after the last one."""
        if step % self.config.checkpoint.every_num_steps and step != self.config.num_steps:
            return
        with tempfile.TemporaryDirectory() as folder, self._total.timed("checkpoints"):
            self._engine.save(Path(folder), step)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def show_samples(self, step: int) -> None:
        """Log a grid of held-out images; the last step's grid is the final evaluation's."""
        if step % self.config.evaluation.every_num_steps or step == self.config.num_steps:
            return
        with self._total.timed("sample_grids"):
            images = self._draw_held_out(self._num_grid_images)
        if images is not None:
            self._log(lambda tracker: tracker.log_image(self._grid(images), "samples", step))

    def export(self) -> None:
        """Write the aligned model as a folder that FluxPipeline loads."""
        with self._total.timed("export"):
            self._engine.export(lambda policy: self._flux.save_pipeline(policy, self._folder / "model"))
        self._log(lambda tracker: tracker.log_model_folder(self._folder / "model"))

    def summarise(self) -> None:
        """Worker 0 writes before and after, as numbers and as a picture, and ends its record."""
        if self._journal is None:
            return
        base, aligned = (Evaluation.load(self._evaluation_path(name)) for name in ("base", "aligned"))
        summary = {
            "base": base.numbers,
            "aligned": aligned.numbers,
            "num_images": len(base.images),
            "seconds": self._total.seconds,
        }
        files = self._folder / "evaluation.json", self._folder / "before_after.png"
        files[0].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shown = slice(self._num_grid_images)
        before_after(base.images[shown], aligned.images[shown], self._held_out.prompts[shown]).save(files[1])
        for file in files:
            self._journal.log(partial(Tracker.log_file, path=file))
        self._journal.close()

    @property
    def _num_grid_images(self) -> int:
        return min(self.config.evaluation.num_grid_images, len(self._held_out.prompts))

    def _samples(self, step: int) -> list[tuple[int, str]]:
        """This worker's part of the global batch: sample indices and their prompts."""
        config = self.config
        order = batch_indices(config.seed, step, config.engine.global_batch, len(self._prompts))
        mine = shard(config.engine.global_batch, self._rank, self._num_workers)
        return [(index, self._prompts[order[index]]) for index in mine]

    def _pairs(self, prompts: Sequence[str]) -> tuple[PromptPair, ...]:
        words = self.config.control_words
        return tuple(PromptPair(prompt, words.positive, words.negative) for prompt in prompts)

    def _score(
        self, images: Float32, pairs: tuple[PromptPair, ...], preference_scales: tuple[float, ...]
    ) -> RewardResponse:
        return self._client.score(RewardRequest(images, pairs, preference_scales, self._rewards))

    def _draw_held_out(self, num_images: int) -> Tensor | None:
        return self._held_out.draw(self._engine.policy, self._flux, self._encoded, num_images)

    def _judge(self, images: Tensor) -> dict[str, float]:
        prompts, batch = self._held_out.prompts, self.config.evaluation.batch
        judged = self._judges.numbers(images, prompts, batch) if self._judges else {}
        return judged | {"eval/reward": self._mean_reward(images)}

    def _mean_reward(self, images: Tensor) -> float:
        batch, rewards = self.config.evaluation.batch, []
        for start in range(0, len(images), batch):
            pairs = self._pairs(self._held_out.prompts[start : start + batch])
            chunk = (images[start : start + batch].float() / 255).numpy()
            scales = (_EVALUATION_PREFERENCE_SCALE,) * len(pairs)
            request = RewardRequest(chunk, pairs, scales, self._rewards, with_gradient=False)
            rewards += self._client.score(request).rewards.tolist()
        return sum(rewards) / len(rewards)

    def _grid(self, images: Tensor) -> PIL.Image.Image:
        num_shown = self._num_grid_images
        return picture_grid(images[:num_shown], self._held_out.prompts[:num_shown], _GRID_COLUMNS)

    def _evaluation_path(self, policy_name: str) -> Path:
        return self._folder / f"{policy_name}.safetensors"

    def _log(self, write: Callable[[Tracker], None]) -> None:
        if self._journal is not None:
            self._journal.log(write)


def held_out_images(config: RunConfig, shift: float) -> HeldOut:
    """The images of an evaluation: every held-out prompt, num_images_per_prompt times."""
    evaluation, size = config.evaluation, (config.model.height_px, config.model.width_px)
    labels = load_prompts(evaluation.prompts_path)
    prompts = tuple(label for label in labels for _ in range(evaluation.num_images_per_prompt))
    sampling = Sampling(evaluation.num_steps, evaluation.guidance_scale, shift, *size)
    return HeldOut(prompts, config.seed, evaluation.batch, sampling)


def encode_ahead(
    flux: FluxModel, prompts: Sequence[str], max_sequence_length: int
) -> Callable[[Sequence[str]], Conditioning]:
    """Encode each prompt once; returns what looks their conditioning up."""
    unique = list(dict.fromkeys(prompts))
    chunks = [unique[start : start + _ENCODE_BATCH] for start in range(0, len(unique), _ENCODE_BATCH)]
    parts = [flux.encode_prompts(chunk, max_sequence_length) for chunk in chunks]
    table = Conditioning(torch.cat([part.prompt_embeds for part in parts]), torch.cat([part.pooled for part in parts]))
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    return lambda wanted: table[[row_of[prompt] for prompt in wanted]]
