"""Encode prompts by a checkpoint's CLIP and T5. loading.py loads them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # their folders in a checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Encoded prompts: `prompt_embeds` (batch, text_tokens, channels) from T5, `pooled` (batch, channels) from CLIP.

    >>> conditioning = policy.encode_prompts(["grinning face", "red heart"], max_sequence_length=16)
    >>> len(conditioning[[0, 0, 1]])
    3
    """

    prompt_embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, which: slice | Sequence[int] | Tensor) -> Conditioning:
        """Return a batch of some of the prompts, by slice or by indices (which may repeat)."""
        index = which if isinstance(which, slice | Tensor) else list(which)
        return Conditioning(self.prompt_embeds[index], self.pooled[index])


class TextEncoders:
    """The text encoders and tokenizers of a FluxPipeline, which may lack all else."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.max_clip_tokens: int = pipeline.tokenizer_max_length

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> Conditioning:
        """Return the Conditioning of prompts, with max_sequence_length T5 tokens each; longer prompts are cut.

        Prompts are encoded one at a time, so that their numbers do not depend on what is encoded beside them.
        """
        # the pipeline warns at each prompt that is cut; data/prompt_lengths.py says it once, with the count
        logging.getLogger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)
        device = self._pipeline.text_encoder.device
        parts = [
            self._pipeline.encode_prompt(prompt, None, device=device, max_sequence_length=max_sequence_length)
            for prompt in prompts
        ]
        dtype = self._pipeline.text_encoder_2.dtype
        prompt_embeds, pooled, _ = zip(*parts, strict=True)
        return Conditioning(torch.cat(prompt_embeds).to(dtype), torch.cat(pooled).to(dtype))

    def num_t5_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of each prompt with T5's end mark, before anything is cut."""
        return [len(ids) for ids in self._pipeline.tokenizer_2(list(prompts), verbose=False).input_ids]

    def num_clip_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of each prompt with CLIP's start and end marks, before anything is cut."""
        return [len(ids) for ids in self._pipeline.tokenizer(list(prompts), verbose=False).input_ids]

    def drop(self) -> None:
        """Free the encoders' memory; the tokenizers stay."""
        self._pipeline.text_encoder = self._pipeline.text_encoder_2 = None
