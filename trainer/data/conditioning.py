"""Give prompts their conditioning: encoded when the run starts, or before it by `srpo encode-prompts`.

encode = encoder(config, policy, prompts)
conditioning = encode(prompts[:4])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from services.config.run import RunConfig
from trainer.data.prompt_embeddings import Embeddings, EmbeddingsManifest, fingerprint
from trainer.model.policy import Policy
from trainer.model.text_encoders import Conditioning

Encode = Callable[[Sequence[str]], Conditioning]


def manifest_of(config: RunConfig, source: Path) -> EmbeddingsManifest:
    """Return what the run's embeddings depend on; `source` is the model's folder."""
    return EmbeddingsManifest(
        text_encoders=fingerprint(source),
        max_sequence_length=config.model.max_sequence_length,
        dtype=config.text_encoder_dtype,
    )


def check_embeddings(config: RunConfig, prompts: Iterable[str]) -> None:
    """Raise EmbeddingsError if training could not read the prompts' embeddings."""
    folder, source = config.prompts.embeddings_path, Path(config.model.path)
    if folder is not None:
        manifest = manifest_of(config, source) if source.is_dir() else None  # the hub's: workers fetch it and compare
        Embeddings.open(folder, manifest).require(prompts)


def load_policy(config: RunConfig, device: torch.device, *, gradient_checkpointing: bool = False) -> Policy:
    """Load the run's model, without text encoders if the run reads embeddings. Raise ModelError."""
    encodes = config.prompts.embeddings_path is None
    return Policy.load(
        config.model.path,
        getattr(torch, config.model.dtype),
        device,
        vae_dtype=getattr(torch, config.vae_dtype),
        text_encoder_dtype=getattr(torch, config.text_encoder_dtype),
        gradient_checkpointing=gradient_checkpointing,
        text_encoders=encodes,
    )


def encoder(config: RunConfig, policy: Policy, prompts: Sequence[str]) -> Encode:
    """Return a function from some of `prompts` to their conditioning; drop the policy's text encoders.

    `policy` comes from load_policy. Raise EmbeddingsError if prompts.embeddings_path lacks some of the prompts.
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
    """Encode each prompt once; return a function that looks their conditioning up."""
    unique = list(dict.fromkeys(prompts))
    table = policy.encode_prompts(unique, max_sequence_length)
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    return lambda wanted: table[[row_of[prompt] for prompt in wanted]]
