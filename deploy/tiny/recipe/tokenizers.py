"""Captions -> the tokenizers of FLUX and of the reward: CLIP's byte-level BPE and T5's unigram."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import CLIPTokenizer, T5Tokenizer

from deploy.tiny.recipe.data import STYLES, Emoji

NUM_CLIP_TOKENS, NUM_T5_TOKENS, NUM_T5_SENTINELS = 3000, 2500, 100


def clip_tokenizer(emoji: Emoji, max_length: int) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer().train_new_from_iterator(_corpus(emoji), NUM_CLIP_TOKENS, show_progress=False)
    tokenizer.model_max_length = max_length
    return tokenizer


def t5_tokenizer(emoji: Emoji, max_length: int) -> T5Tokenizer:
    tokenizer = T5Tokenizer().train_new_from_iterator(_corpus(emoji), NUM_T5_TOKENS, show_progress=False)
    tokenizer.model_max_length = max_length
    return tokenizer


def _corpus(emoji: Emoji) -> Iterator[str]:
    """Yield captions of the training subjects; held-out words are spelled in pieces."""
    for subject in (~emoji.heldout).nonzero().flatten().tolist():
        for style in STYLES:
            yield f"{style}. {emoji.labels[subject]}"
        yield from emoji.tags[subject]
