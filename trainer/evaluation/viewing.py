"""Write the page of a blind viewing: pairs of images of base and model, sides shuffled, the real picture beside them.

The page does not say which side is the model's. The key, a file of its own, does; `srpo viewing KEY CHOICES` reads the
choices that viewers have saved.
"""

from __future__ import annotations

import hashlib
import html
import random
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from torch import Tensor

from trainer.evaluation.report import image_tag

_SIDES = ("left", "right")
_INTRODUCTION = (
    "Each pair shows the same prompt, drawn from the same noise by two models. Choose the image that is closer to "
    "{what}. Mark an image as broken if parts of it are missing or smeared that the other one has."
)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Images (3, height, width) uint8 of one prompt: the base's, the model's and, if there is one, the real picture."""

    prompt: str
    base: Tensor
    model: Tensor
    real: Tensor | None


def choose_rows(num_images: int, num_pairs: int, seed: int) -> list[int]:
    """Return the rows to show, drawn without replacement. Raise ValueError if there are too few images."""
    if num_pairs > num_images:
        raise ValueError(f"comparison.num_viewing_pairs is {num_pairs}, but there are only {num_images} images")
    return random.Random(seed).sample(range(num_images), num_pairs)


def render_viewing(title: str, pairs: list[Pair], seed: int) -> tuple[str, dict[str, object]]:
    """Return the page and its key: {viewing, pairs: [{prompt, model: "left" or "right"}]}."""
    chance = random.Random(f"sides {seed}")
    sides = [chance.choice(_SIDES) for _ in pairs]
    blocks = [_block(number, pair, side) for number, (pair, side) in enumerate(zip(pairs, sides, strict=True))]
    has_real = all(pair.real is not None for pair in pairs)
    body = "\n".join(blocks)
    viewing = hashlib.sha256(body.encode()).hexdigest()[:12]
    template = Template((files("trainer.evaluation") / "viewing.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(title),
        introduction=_INTRODUCTION.format(what="the real picture beside it" if has_real else "its prompt"),
        pairs=body,
        viewing=viewing,
    )
    key = [{"prompt": pair.prompt, "model": side} for pair, side in zip(pairs, sides, strict=True)]
    return page, {"viewing": viewing, "pairs": key}


def _block(number: int, pair: Pair, model_side: str) -> str:
    shown = (pair.model, pair.base) if model_side == "left" else (pair.base, pair.model)
    figures = [_figure(image, side) for image, side in zip(shown, _SIDES, strict=True)]
    if pair.real is not None:
        figures.append(_figure(pair.real, "real"))
    closer = "".join(
        f'<label><input type="radio" name="closer-{number}" value="{value}"> {value}</label>'
        for value in ("left", "right", "same")
    )
    broken = "".join(f'<label><input type="checkbox" name="broken-{side}-{number}"> {side}</label>' for side in _SIDES)
    return (
        f'<section class="pair" data-pair="{number}"><h2>{html.escape(pair.prompt)}</h2>'
        f'<div class="images">{"".join(figures)}</div>'
        f"<fieldset>Closer: {closer}</fieldset><fieldset>Broken: {broken}</fieldset></section>"
    )


def _figure(image: Tensor, caption: str) -> str:
    return f"<figure>{image_tag(image, caption)}<figcaption>{caption}</figcaption></figure>"
