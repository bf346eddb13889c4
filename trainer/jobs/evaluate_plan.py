"""Plan an evaluation: which policies draw and measure which pictures, and where the chunks of each are kept.

Two pictures are the same if model, prompts, seed, sampling and batch are; what was measured of them is the same if the
rewards, words, judges, real pictures and the code that measures are too. Both are digests (kept_chunks.py), so that a
changed judge measures the kept pictures again, and a changed model draws them again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.config.run import RunConfig
from trainer.data.prompt_files import load_prompts
from trainer.data.run_prompts import told_prompts
from trainer.evaluation import measurements
from trainer.evaluation.kept_chunks import KeptChunks, identity
from trainer.evaluation.real_pictures import picture_files

BASE, ORACLE = "base", "oracle"


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """A policy, what it is told for each picture, and the folders of its chunks.

    weights: the folder of a model or checkpoint, None for the base model's own.
    """

    name: str
    weights: str | None
    prompts: tuple[str, ...]
    drawn: str
    measured: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All policies, the base model first. prompts: what each picture shows, of whatever policy; batch: of a chunk.

    rewards: the names of all that are served. reference: the folder of the features of evaluation.reference_path's
    pictures, num_reference_chunks of them; 0 without it.
    """

    policies: tuple[PolicyPlan, ...]
    prompts: tuple[str, ...]
    batch: int
    rewards: tuple[str, ...]
    reference: str
    num_reference_chunks: int

    @property
    def num_chunks(self) -> int:
        """Return how many chunks each policy draws."""
        return math.ceil(len(self.prompts) / self.batch)

    def rows(self, chunk: int) -> range:
        """Return the pictures of a chunk."""
        return range(chunk * self.batch, min((chunk + 1) * self.batch, len(self.prompts)))

    def num_kept(self, folder: str) -> int:
        """Return how many pictures are in a folder of chunks."""
        kept = KeptChunks(Path(folder))
        return sum(len(self.rows(chunk)) for chunk in range(self.num_chunks) if kept.has(chunk))

    @property
    def is_done(self) -> bool:
        """Return whether everything is kept already."""
        reference = KeptChunks(Path(self.reference))
        return all(self.num_kept(policy.measured) == len(self.prompts) for policy in self.policies) and all(
            reference.has(chunk) for chunk in range(self.num_reference_chunks)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, which pass through processes that lack this checkout."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        """Return the plan of what `to_dict` gave."""
        return cls(**{**plan, "policies": tuple(PolicyPlan(**each) for each in plan["policies"])})


def make_plan(config: RunConfig, folders: Mapping[str, Path], rewards: Mapping[str, str | None], kept_in: Path) -> Plan:
    """Plan to compare the policies in `folders` with the base model by `rewards`, name -> checksum of the weights."""
    prompts, batch = held_out_prompts(config), config.evaluation.batch
    judges = _identity(config.evaluation.judge_path)
    drawing, measuring = _drawing(config), _measuring(config, rewards) | {"judges": judges, "prompts": prompts}
    wanted: list[tuple[str, Path | None, tuple[str, ...]]] = [(BASE, None, prompts)]
    if config.evaluation.draws_oracle:
        wanted.append((ORACLE, None, told_prompts(config, prompts)))
    wanted += [(name, folder, prompts) for name, folder in folders.items()]
    policies: list[PolicyPlan] = []
    for name, folder, told in wanted:
        weights = {"weights": identity(folder), "finetune": config.finetune.model_dump(mode="json")} if folder else {}
        drawn = str(KeptChunks.of(kept_in, {**drawing, **weights, "prompts": told}).folder)
        base = policies[0].drawn if policies else drawn
        measured = str(KeptChunks.of(kept_in, {**measuring, "drawn": drawn, "base": base}).folder)
        policies.append(PolicyPlan(name, str(folder.resolve()) if folder else None, told, drawn, measured))
    size = config.model.height_px, config.model.width_px
    real = {"reference": _identity(config.evaluation.reference_path), "judges": judges, "size": size, "batch": batch}
    reference = str(KeptChunks.of(kept_in, {**real, "code": _code()}).folder)
    files = picture_files(config.evaluation.reference_path) if config.evaluation.reference_path is not None else []
    return Plan(tuple(policies), prompts, batch, tuple(rewards), reference, math.ceil(len(files) / batch))


def held_out_prompts(config: RunConfig) -> tuple[str, ...]:
    """Return a prompt for each picture."""
    labels = load_prompts(config.evaluation.prompts_path, config.prompts.column)
    return tuple(label for label in labels for _ in range(config.comparison.num_images_per_prompt))


def _drawing(config: RunConfig) -> dict[str, Any]:
    """Return what a picture depends on besides its prompt and a policy's weights."""
    evaluation, model = config.evaluation, config.model
    path = Path(model.path)
    return {
        "model": model.model_dump(mode="json", exclude={"sizes"}) | (identity(path) if path.exists() else {}),
        "seed": config.seed,
        "shift": config.rollout.shift,
        "num_steps": evaluation.num_steps,
        "guidance_scale": evaluation.guidance_scale,
        "batch": evaluation.batch,
        "use_gpu": config.engine.use_gpu,
    }


def _measuring(config: RunConfig, rewards: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what a picture's numbers depend on besides the picture, its prompt and the judges."""
    truth = config.evaluation.truth
    return {
        "rewards": dict(rewards),
        "words": config.control_words.model_dump(mode="json"),
        "words_of_rewards": {
            each.name: each.control_words and each.control_words.model_dump(mode="json") for each in config.rewards
        },
        "truth": truth and truth.model_dump(mode="json") | identity(truth.path),
        "code": _code(),
    }


def _identity(path: Path | None) -> dict[str, Any] | None:
    return identity(path) if path is not None else None


def _code() -> str:
    """Return the digest of the files that measure."""
    files = sorted(Path(measurements.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
