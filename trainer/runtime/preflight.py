"""Check a run before a worker starts: whatever would fail minutes later is found now, and named in one line."""

from __future__ import annotations

import os
from pathlib import Path

from services.clients.reward import RewardClient
from services.clients.tracking_errors import check_metric_name
from services.config.run import RunConfig
from trainer.data.batches import open_batches
from trainer.data.conditioning import check_embeddings
from trainer.data.latents import require_unchanged
from trainer.data.prompt_files import load_prompts
from trainer.data.run_prompts import drawn_prompts, judged_prompts, oracle_prompts
from trainer.evaluation.real_pictures import picture_files, truth_of
from trainer.flow import level_sigmas, num_delta_levels
from trainer.model.loading import check_model_path
from trainer.runtime.accepted_prompts import require_accepted
from trainer.runtime.cluster import check_cluster


class PreflightError(ValueError):
    """A run cannot start as it is; the text names the key, its value and the cure."""


def check_run(config: RunConfig) -> None:
    """Raise an error that names the key and the cure for anything that this machine and the service can know.

    Errors: PreflightError, ModelError, PromptsError, DatasetError, EmbeddingsError, RefusedError, RewardError,
    ClusterError, and ValueError for what guard, objective or reference pictures cannot use.
    """
    _check_files(config)
    drawn, judged = drawn_prompts(config), judged_prompts(config)
    check_embeddings(config, (each.prompt for each in (*drawn, *judged, *oracle_prompts(config))))
    _check_evaluation(config)
    shift, objective = config.rollout.shift, config.objective
    if shift != "dynamic" or objective.sigma_range is not None:  # otherwise the workers check, which have the model
        num_delta_levels(objective, level_sigmas(objective, 1.0 if shift == "dynamic" else shift))
    _check_rewards(config)
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    service = config.reward_service
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=service.max_attempts) as client:
        require_accepted(client, config, drawn, judged)


def _check_files(config: RunConfig) -> None:
    check_model_path(config.model.path)
    folder = Path(config.model.path)
    open_batches(config, folder if (folder / "vae").is_dir() else None)
    require_unchanged(config)
    judges = config.evaluation.judge_path
    if judges is not None and not judges.is_dir():
        raise PreflightError(f"evaluation.judge_path {judges} is not a folder: give one, or null to do without judges")
    if config.evaluation.reference_path is not None:
        picture_files(config.evaluation.reference_path)


def _check_evaluation(config: RunConfig) -> None:
    """Raise an error for held-out prompts that cannot be evaluated: too few, or without a real picture or subject."""
    evaluation = config.evaluation
    prompts = list(load_prompts(evaluation.prompts_path, config.prompts.column))
    if len(prompts) < 2:
        raise PreflightError(f"evaluation.prompts_path {evaluation.prompts_path} has one prompt: give two or more")
    truth_of(config, prompts)
    if evaluation.judge_path is None:
        return
    from trainer.evaluation.judges import Judges  # on use: only such a run waits for transformers

    if unknown := sorted(set(prompts) - set(Judges.subjects(evaluation.judge_path))):
        raise PreflightError(f"evaluation.judge_path knows no subject {unknown[0]!r} of evaluation.prompts_path")


def _check_rewards(config: RunConfig) -> None:
    """Raise an error unless the service answers at once and serves every reward that run and guard name."""
    service = config.reward_service
    with RewardClient(service.url, timeout_s=service.timeout_s, max_attempts=2) as client:
        offered = client.models()
    for index, reward in enumerate(config.rewards):
        check_metric_name(reward.name)
        if reward.name not in offered:
            raise PreflightError(
                f"rewards.{index}.name {reward.name!r} is not served at {service.url}; served: {', '.join(offered)}"
            )
    if config.guard is not None:
        from trainer.evaluation.guard import check_guard  # on use: only such a run waits for transformers

        check_guard(config, config.guard, offered)
