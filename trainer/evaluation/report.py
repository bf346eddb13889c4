"""Render a comparison of policies as one self-contained HTML file: numbers with intervals, images side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import PIL.Image
from torch import Tensor

from trainer.evaluation.bootstrap import Interval

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
small { color: #666; display: block }
.clear { font-weight: bold }
img { width: 128px; image-rendering: pixelated; display: block }
"""


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One policy's images (num_images, 3, height, width) uint8, numbers by name, and differences from the base's.

    The base model's own column has no differences.
    """

    name: str
    images: Tensor
    numbers: Mapping[str, Interval]
    differences: Mapping[str, Interval]


def render(title: str, introduction: str, columns: Sequence[Column], captions: Sequence[str]) -> str:
    """Return the page. `captions` name the rows of images to show, which are the first ones of each column."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>"
        f"{_table(columns)}<h2>Pictures</h2>{_pictures(columns, captions)}</html>\n"
    )


def _table(columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{html.escape(column.name)}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(column, name) for column in columns)}</tr>"
        for name in dict.fromkeys(name for column in columns for name in column.numbers)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(column: Column, name: str) -> str:
    if name not in column.numbers:
        return "<td></td>"
    cell = _format(column.numbers[name])
    if name in column.differences:
        difference = column.differences[name]
        mark = ' class="clear"' if difference.excludes_zero else ""
        cell += f"<small{mark}>{_format(difference, '+')}</small>"
    return f"<td>{cell}</td>"


def _format(interval: Interval, sign: str = "") -> str:
    """Return an interval as text.

    >>> _format(Interval(0.7, 0.63, 0.77), "+")
    '+0.7 [+0.63, +0.77]'
    """
    return f"{interval.value:{sign}.4g} [{interval.low:{sign}.4g}, {interval.high:{sign}.4g}]"


def _pictures(columns: Sequence[Column], captions: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(column.name)}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{html.escape(caption)}</td>"
        + "".join(f"<td>{image_tag(column.images[row], f'{caption}, {column.name}')}</td>" for column in columns)
        + "</tr>"
        for row, caption in enumerate(captions)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def image_tag(image: Tensor, alt: str) -> str:
    """Return an <img> that contains a uint8 image (3, height, width) as a PNG in a data URI."""
    file = io.BytesIO()
    PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
