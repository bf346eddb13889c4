"""The prompts that a run uses, and their conditioning, encoded in the run or before it by `srpo encode-prompts`.

encode = encoder(config, policy, prompts)
conditioning = encode(prompts[:4])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from services.config.evaluation import GuardConfig
from services.config.run import RunConfig
from trainer.data.batches import located_prompts, open_batches
from trainer.data.prompt_embeddings import Embeddings, Manifest, fingerprint
from trainer.data.prompt_files import LocatedPrompt
from trainer.draws import draw_guard_prompts
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

Encode = Callable[[Sequence[str]], Conditioning]


def used_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Every prompt that the run will encode, once, with where it stands. Raises PromptsError naming the key as well."""
    return _once((*drawn_prompts(config), *judged_prompts(config)))


def drawn_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Those that training will draw. Raises PromptsError or DatasetError."""
    batches = open_batches(config)
    place_of = dict(batches.located)
    drawn = (prompt for step in range(config.num_steps) for prompt in batches.batch(step).prompts)
    return _once(LocatedPrompt(prompt, place_of[prompt]) for prompt in drawn)


def judged_prompts(config: RunConfig) -> list[LocatedPrompt]:
    """Those of evaluation and guard. Raises PromptsError."""
    held_out = located_prompts(config, "evaluation.prompts_path", config.evaluation.prompts_path)
    return _once((*held_out, *(located_guard_prompts(config, config.guard) if config.guard else ())))


def _once(prompts: Iterable[LocatedPrompt]) -> list[LocatedPrompt]:
    """Each text at its first place."""
    by_text: dict[str, LocatedPrompt] = {}
    for each in prompts:
        by_text.setdefault(each.prompt, each)
    return list(by_text.values())


def located_guard_prompts(config: RunConfig, guard: GuardConfig) -> tuple[LocatedPrompt, ...]:
    """The prompts of every check. Raises PromptsError where there are fewer than guard.num_prompts."""
    if guard.prompts_path is None:
        prompts = list({each.prompt: each for each in open_batches(config).located}.values())
    else:
        prompts = located_prompts(config, "guard.prompts_path", guard.prompts_path)
    return draw_guard_prompts(config.seed, prompts, guard.num_prompts)


def manifest_of(config: RunConfig, source: Path) -> Manifest:
    """What the run's embeddings depend on; `source` is the model's folder."""
    return Manifest(fingerprint(source), config.model.max_sequence_length, config.model.dtype)


def check_embeddings(config: RunConfig, prompts: Iterable[str]) -> None:
    """Raise EmbeddingsError where training could not read the prompts' embeddings."""
    folder, source = config.prompts.embeddings_path, Path(config.model.path)
    if folder is not None:
        manifest = manifest_of(config, source) if source.is_dir() else None  # the hub's: workers fetch it and compare
        Embeddings.open(folder, manifest).require(prompts)


def load_policy(config: RunConfig, device: torch.device, *, gradient_checkpointing: bool = False) -> Policy:
    """The run's model; without text encoders where the run reads embeddings. Raises ModelError."""
    encodes = config.prompts.embeddings_path is None
    path, dtype = config.model.path, getattr(torch, config.model.dtype)
    return Policy.load(path, dtype, device, gradient_checkpointing=gradient_checkpointing, text_encoders=encodes)


def encoder(config: RunConfig, policy: Policy, prompts: Sequence[str]) -> Encode:
    """What gives the conditioning of these prompts, of load_policy's model. The text encoders are not needed again.

    Raises EmbeddingsError where prompts.embeddings_path has not all of them.
    """
    folder = config.prompts.embeddings_path
    if folder is None:
        encode = encode_ahead(policy, prompts, config.model.max_sequence_length)
        policy.drop_text_encoders()
        return encode
    assert policy.source is not None  # load_policy's has one
    embeddings = Embeddings.open(folder, manifest_of(config, policy.source))
    embeddings.require(prompts)
    return lambda wanted: embeddings.read(wanted, policy.device)


def encode_ahead(policy: Policy, prompts: Sequence[str], max_sequence_length: int) -> Encode:
    """Encode each prompt once; returns what looks their conditioning up."""
    unique = list(dict.fromkeys(prompts))
    table = policy.encode_prompts(unique, max_sequence_length)
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    return lambda wanted: table[[row_of[prompt] for prompt in wanted]]
