"""Find the prompts that a model's text encoders cut."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.prompt_files import LocatedPrompt
from trainer.model.text_encoders import TextEncoders

_NUM_SHOWN_CHARACTERS = 60


def describe_cut_prompts(text: TextEncoders, prompts: Sequence[LocatedPrompt], max_sequence_length: int) -> str | None:
    """Say how many prompts the encoders cut, at what limit, and which is the first; None if they cut none."""
    texts = [each.prompt for each in prompts]
    t5, clip = text.num_t5_tokens(texts), text.num_clip_tokens(texts)
    warnings = []
    for counts, limit, what in (
        (t5, max_sequence_length, "T5 tokens (model.max_sequence_length), and the model does not see their ends"),
        (clip, text.max_clip_tokens, "CLIP tokens, and the pooled vector does not tell of their ends"),
    ):
        if cut := [index for index, count in enumerate(counts) if count > limit]:
            first = prompts[cut[0]]
            warnings.append(
                f"{len(cut)} of {len(prompts)} prompts have more than {limit} {what}; the first is {first.place}, "
                f"{counts[cut[0]]} tokens: {first.prompt[:_NUM_SHOWN_CHARACTERS]!r}"
            )
    return "; ".join(warnings) or None
