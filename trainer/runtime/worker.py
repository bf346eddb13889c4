"""Hold all that a training process works with, and do its work between two steps: steer, record, check the guard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.clients.patient_reward import PatientRewardClient
from services.clients.run_folder import RunFolder
from services.clients.spool import Spool
from services.config.run import RunConfig
from services.contract import Float32, PromptPair, RewardRequest, RewardResponse, WeightedReward
from services.disk import full_disk_named
from trainer.algorithm.learner import worker_samples
from trainer.algorithm.methods import make_learner, num_backwards
from trainer.algorithm.step_metrics import StepMetrics, progress_line
from trainer.data.batches import open_batches
from trainer.data.conditioning import Encode, encoder, load_policy
from trainer.data.prompt_lengths import describe_cut_prompts
from trainer.data.run_prompts import drawn_prompts, used_prompts
from trainer.evaluation.drawing import Draw, PictureSet, evaluation_pictures, oracle_pictures
from trainer.evaluation.guard import Guard, guard_measurer, guard_pictures
from trainer.evaluation.judges import Judges
from trainer.model.engine import Engine, init_distributed
from trainer.model.lora import adapter, add_adapter, whole
from trainer.model.policy import Policy
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.paths import replaced_folder
from trainer.runtime.steering import LiveSteering, check_with_service

if TYPE_CHECKING:
    from services.clients.delivery import Delivery


class Worker:
    """A training process, with policy, engine, learner and guard. All workers call every method, in the same order."""

    def __init__(self, config: RunConfig, run: RunFolder) -> None:
        self.config, self.run, self.folder = config, run, run.path
        logging.getLogger().setLevel(logging.WARNING)  # Ray sets INFO: a line for every request and report
        self.seconds = StepMetrics()  # by phase, over the whole run
        self.heartbeat = Heartbeat(config.engine.heartbeat_minutes)
        with self.seconds.timed("load"):
            torch.set_num_threads(config.engine.threads_per_worker)
            self.device = init_distributed(config.engine.use_gpu)
            self.rank, self.num_workers = dist.get_rank(), dist.get_world_size()
            self._spool = Spool(run.path, config.tracking.spool_mib) if self.rank == 0 else None
            self._delivery = self._begin_delivery() if self._spool else None
            self.policy, self.engine = self._load_policy()
            shift = self.policy.resolve_shift(config.rollout.shift, config.model.height_px, config.model.width_px)
            self.pictures, self.oracle_pictures = evaluation_pictures(config, shift), oracle_pictures(config, shift)
            self.client = PatientRewardClient(config.reward_service, beat=self.heartbeat.beat, tell=self.say)
            judge_path = config.evaluation.judge_path
            self.judges = Judges.load(judge_path, self.device) if judge_path else None
            self.guard = self._make_guard()
            self._encode = self._encode_prompts()
            self.learner = make_learner(config, self.engine, self.policy, self._score, self._encode)
            check = partial(check_with_service, self.client, drawn_prompts(config) if self.is_recording else [])
            read_tags = self._delivery.tags if self._delivery else None
            self.steering = LiveSteering(config, self.device, self._spool, read_tags, check)
        self.last_numbers: dict[str, float] = {}  # the last step's metrics and the last check's, on worker 0
        self.policy.transformer.register_forward_pre_hook(lambda *_: self.heartbeat.beat())

    @property
    def is_recording(self) -> bool:
        """Return whether this is worker 0, which prints and writes to MLflow."""
        return self._spool is not None

    @property
    def num_grid_images(self) -> int:
        """Return how many of the held-out images a grid shows."""
        return min(self.config.evaluation.num_grid_images, len(self.pictures.prompts))

    def log(self, write: Callable[[Spool], None]) -> None:
        """On worker 0, have `write` called with the run's record, which reaches MLflow later; elsewhere do nothing."""
        if self._spool is not None:
            with self.seconds.timed("record"):
                write(self._spool)

    def say(self, text: str) -> None:
        """Print a line on worker 0."""
        if self.is_recording:
            print(text, flush=True)

    def close(self) -> None:
        """End what runs beside the training. The launcher delivers what the record still holds."""
        self.heartbeat.stop()
        if self._spool is not None and self._delivery is not None:
            self._spool.close()
            self._delivery.close(timeout_s=0)

    def warn_of_cut_prompts(self) -> None:
        """Print which prompts the text encoders cut, and record it as a tag."""
        config = self.config
        if not self.is_recording:
            return
        if cut := describe_cut_prompts(self.policy.text, used_prompts(config), config.model.max_sequence_length):
            print(f"warning: {cut}", flush=True)
            self.log(lambda record: record.set_tag("warning_long_prompts", cut))

    def steer(self, step: int) -> None:
        """Apply what the MLflow run's tag gives, or what a repeated step had before."""
        with self.learner.metrics.timed("steer"):
            self.steering.sync(step)
        self.learner.follow(self.steering.config)
        self.learner.metrics.add("steering_version", self.steering.in_force.version)

    def time_step(self) -> AbstractContextManager[None]:
        """Return a context whose duration is the step's seconds."""
        return self.learner.metrics.timed("step")

    def record(self, step: int) -> None:
        """Print and log the step's metrics, averaged over all workers. `step` counts the steps taken."""
        metrics = self.learner.metrics.mean_over_workers(self.device)
        self.learner.metrics = StepMetrics()
        self.seconds.add_seconds("steps", metrics["seconds_step"])
        if self.is_recording:
            print(progress_line(step, self.config.num_steps, metrics), flush=True)
        self.last_numbers = {**self.last_numbers, **metrics}
        self.log(lambda record: record.log_metrics("step", metrics, step))

    def check_guard(self, step: int) -> None:
        """Draw and measure the guard's images if a check is due and has not been made."""
        guard = self.guard
        if guard is None or not guard.is_due(step):
            return
        with self.seconds.timed("guard"), self.engine.averaged():
            numbers = guard.check(step, self.drawing(guard.pictures))
        self.last_numbers = {**self.last_numbers, **numbers}
        self.log(lambda record: record.log_metrics("guard", numbers, step))

    def must_end(self) -> bool:
        """Return whether the guard's last check ends the run; the same on all workers."""
        return self.guard is not None and self.guard.broken_rule is not None

    def draw(self, pictures: PictureSet, num_images: int) -> Tensor | None:
        """Draw the first images of a set, with the averaged weights if the run keeps an average.

        Return (num_images, 3, height, width) uint8 on worker 0, None elsewhere.
        """
        with self.engine.averaged():
            return pictures.draw(self.policy, self._encode, num_images)

    def take_base(self) -> None:
        """Give the policy the base model's weights again: an adapter of zeros, or what is on disk."""
        if self.config.finetune.kind == "lora":
            self.engine.replace_weights(lambda name: torch.zeros(self.engine.trained_shapes[name]))
        else:
            self.engine.replace_weights(self.policy.source_weights().__getitem__)

    def drawing(self, pictures: PictureSet) -> Draw:
        """Return what draws images of a set, by their indices, with the weights as they are."""
        return partial(pictures.draw_chunk, self.policy, self._encode)

    def export(self) -> None:
        """Write the aligned model as a folder that FluxPipeline loads, and the adapter alone in a LoRA run."""
        with self.seconds.timed("export"), self.heartbeat.paused(), full_disk_named(self.folder / "model"):
            self.engine.export(self._write_model)
        uploads = {"never": (), "adapter": ("adapter",), "always": ("model", "adapter")}[self.config.tracking.log_model]
        for name in uploads:
            if (self.folder / name).is_dir():
                self.log(partial(Spool.log_folder, path=self.folder / name, name=name))

    def _begin_delivery(self) -> Delivery:
        from services.clients.delivery import Delivery  # on use: MLflow takes 2 s to import, and one worker needs it

        return Delivery(self.folder, self.config.tracking.uri)

    def _load_policy(self) -> tuple[Policy, Engine]:
        config = self.config
        policy = load_policy(config, self.device, gradient_checkpointing=config.engine.gradient_checkpointing)
        if config.finetune.kind == "lora":
            add_adapter(policy.transformer, config.finetune, config.seed)
        num_trained = sum(each.numel() for each in policy.transformer.parameters() if each.requires_grad)
        self.log(lambda record: record.set_tag("num_trained_parameters", str(num_trained)))
        dtype = getattr(torch, config.model.dtype)
        engine = Engine.create(
            policy.transformer,
            config.optimizer,
            config.engine,
            num_backwards(config, self.num_workers),
            dtype,
            config.ema,
        )
        return policy.calling(engine.transformer), engine

    def _make_guard(self) -> Guard | None:
        config, guard = self.config, self.config.guard
        if guard is None:
            return None
        pictures = guard_pictures(config, guard, self.pictures.sampling)
        measurer = guard_measurer(config, guard, self.client, self.judges, pictures.own_prompts())
        return Guard(config, guard, pictures, measurer, self.device, self.folder)

    def _encode_prompts(self) -> Encode:
        """Return the conditioning of every prompt that this worker will draw, encoded now or read from disk."""
        config, place = self.config, (self.rank, self.num_workers)
        batches, steps = open_batches(config), range(config.num_steps)
        indices = worker_samples(config, *place)
        prompts = [batches.batch(step).prompts[index] for step in steps for index in indices]
        drawn = [(self.pictures, len(self.pictures.prompts)), (self.pictures, self.num_grid_images)]
        if self.oracle_pictures is not None:
            drawn.append((self.oracle_pictures, len(self.oracle_pictures.prompts)))
        if self.guard is not None:
            drawn.append((self.guard.pictures, len(self.guard.pictures.prompts)))
        for pictures, num_images in drawn:
            prompts += [pictures.prompts[index] for index in pictures.shard(num_images, *place)]
        return encoder(config, self.policy, prompts)

    def _score(
        self,
        reward: str,
        images: Float32,
        pairs: tuple[PromptPair, ...],
        scales: tuple[float, ...],
        with_gradient: bool,
    ) -> RewardResponse:
        return self.client.score(RewardRequest(images, pairs, scales, (WeightedReward(reward),), with_gradient))

    def _write_model(self, transformer: nn.Module) -> None:
        with replaced_folder(self.folder / "model") as folder:
            self.policy.save_pipeline(whole(transformer, self.config.finetune), folder)
        if self.config.finetune.kind == "lora":
            with replaced_folder(self.folder / "adapter") as folder:
                self.policy.save_adapter(*adapter(transformer), folder)
