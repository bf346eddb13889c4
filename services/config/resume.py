"""Say whether a run may go on under a changed configuration: what changes its mathematics must stay as it was."""

from __future__ import annotations

from services.config.fields import flatten
from services.config.run import RunConfig

# Keys and sections that say where, by whom and how often something is done, but not what is computed.
_FREE = (
    "output_dir",
    "tracking",
    "checkpoint",
    "reward_service",
    "comparison",
    "model.path",
    "prompts.path",
    "prompts.embeddings_path",
    "prompts.shard_prompts",
    "dataset.path",
    "dataset.latents_path",
    "evaluation.prompts_path",
    "evaluation.judge_path",
    "evaluation.reference_path",
    "evaluation.truth.path",
    "evaluation.batch",
    "evaluation.every_num_steps",
    "evaluation.num_grid_images",
    "guard.prompts_path",
    "engine.num_workers",
    "engine.micro_batch",
    "engine.zero_stage",
    "engine.threads_per_worker",
    "engine.cpus_per_worker",
    "engine.memory_gib_per_worker",
    "engine.use_gpu",
    "engine.gradient_checkpointing",
    "engine.heartbeat_minutes",
    "engine.accelerator",
    "engine.must_fit",
    "optimizer.max_skipped_updates",
)


class ResumeError(ValueError):
    """The run cannot go on under this configuration; the text names each key with its old and its new value."""


def require_same_training(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Return the keys that differ and may, each as "old → new". Raise ResumeError if one of the others differs.

    num_steps may grow, which prolongs the run.
    """
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    differing = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
    described = {key: f"{was!r} → {is_now!r}" for key, (was, is_now) in differing.items()}
    refused = [key for key in differing if not _is_free(key) and not (key == "num_steps" and _grows(before, now))]
    if refused:
        changes = "; ".join(f"{key} {described[key]}" for key in refused)
        raise ResumeError(f"the run cannot go on with what changes its training: {changes}. Start a new run for it")
    return described


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _grows(before: RunConfig, now: RunConfig) -> bool:
    return now.num_steps > before.num_steps
