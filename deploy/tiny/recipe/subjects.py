"""Choose the subjects, and say which part of the recipe may see which of them.

The generator draws faces, animals, plants and food: 432 of the 1,558 subjects, so that it learns each of them well. It
is trained on all of these. A share of them is held out from reward, judges and alignment.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from deploy.tiny.recipe.data import STYLES, Emoji

GROUPS = (range(160), range(488, 640), range(645, 766))  # by emojibase's order: faces and hearts; nature; food
HELD_OUT_SHARE = 0.15
TRUE_STYLES = ("3D", "Flat")


@dataclass(frozen=True)
class Subjects:
    """Rows of Emoji.images: `drawn` by the generator; of these `held_out` from reward, judges and alignment."""

    drawn: Tensor
    held_out: Tensor

    @property
    def aligned(self) -> Tensor:
        """Return the drawn subjects that are not held out."""
        return self.drawn[~torch.isin(self.drawn, self.held_out)]


def choose(emoji: Emoji) -> Subjects:
    """Return the subjects, the same at every call."""
    drawn = [row for group in GROUPS for row in group if row < len(emoji.labels)]
    held_out = random.Random(1).sample(drawn, round(len(drawn) * HELD_OUT_SHARE))
    return Subjects(torch.tensor(drawn), torch.tensor(sorted(held_out)))


def classifiable(emoji: Emoji, subjects: Subjects) -> Tensor:
    """Return the subjects on which reward and judges are trained: all but those held out, drawn or not."""
    everything = torch.arange(len(emoji.labels))
    return everything[~torch.isin(everything, subjects.held_out)]


def prompt_sets(emoji: Emoji) -> dict[str, list[str]]:
    """Return the prompts to align on, to choose settings and stop by, and to report, by the name of their file."""
    subjects = choose(emoji)
    rows = {"train": subjects.aligned, "validation": subjects.held_out[::2], "test": subjects.held_out[1::2]}
    return {name: [emoji.labels[row] for row in chosen.tolist()] for name, chosen in rows.items()}


def write_prompts(emoji: Emoji, out: Path) -> None:
    """Write NAME.txt for each set of prompts, a prompt a line."""
    out.mkdir()
    for name, labels in prompt_sets(emoji).items():
        (out / f"{name}.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def write_drawings(emoji: Emoji, out: Path) -> None:
    """Write the real drawings of all held-out subjects in 3D and Flat, each style a folder with metadata.jsonl."""
    for style in TRUE_STYLES:
        folder = out / style
        folder.mkdir(parents=True)
        lines = []
        for row in choose(emoji).held_out.tolist():
            name = f"{row:04}.webp"
            pixels = emoji.images[row, STYLES.index(style)].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name, lossless=True)
            lines.append(json.dumps({"file_name": name, "text": emoji.labels[row]}, ensure_ascii=False))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
