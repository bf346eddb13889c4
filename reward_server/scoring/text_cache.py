"""Cache text embeddings: training prompts come again every epoch, control words with every image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from reward_server.metrics import TEXT_CACHE_HITS, TEXT_CACHE_MISSES, Record


class TextCache:
    """Keeps one reward's text embeddings, the num_texts used last."""

    def __init__(self, reward: str, embed: Callable[[Sequence[str]], Tensor], num_texts: int, record: Record) -> None:
        self._embed = embed
        self._num_texts = num_texts
        self._record = record
        self._labels = {"reward": reward}
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Return (embedding,) for each text. Raise ContractError naming a text that is too long for the reward."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._embeds]
        if unseen:
            rows = self._embed(unseen)
            self._embeds |= {text: row.clone() for text, row in zip(unseen, rows, strict=True)}  # no views of rows
            self._record(TEXT_CACHE_MISSES, len(unseen), self._labels)
        if len(unseen) < len(texts):
            self._record(TEXT_CACHE_HITS, len(texts) - len(unseen), self._labels)
        for text in texts:
            self._embeds.move_to_end(text)
        embeds = [self._embeds[text] for text in texts]
        while len(self._embeds) > self._num_texts:
            self._embeds.popitem(last=False)
        return embeds
