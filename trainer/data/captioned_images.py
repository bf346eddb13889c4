"""List the images with captions in a folder or in parquet files, and read one; errors name file and line.

    for each in list_images(config.dataset):
        pixels = each.read_pixels(each.read_bytes())

Listing opens no image. services/pictures.py reads them: upright, with transparency laid on white.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.config.dataset import CaptionedConfig
from services.lines import read_text
from services.pictures import PictureError, open_picture, read_pixels

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = "metadata.jsonl"


class DatasetError(ValueError):
    """The dataset or its latents cannot be used; the text names the key, the file or the row, and the cure."""


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """
    >>> CaptionedImage(path="/data/cat.png", caption="a cat")
    >>> CaptionedImage(path="/data/cats.parquet", caption="a cat", row=17, row_group=1, first_row=10, column="image")
    """

    path: str
    caption: str
    row: int | None = None  # of a parquet file
    row_group: int = 0
    first_row: int = 0  # of the row group
    column: str = ""

    @property
    def name(self) -> str:
        """Return what an error calls the image."""
        return self.path if self.row is None else f"{self.path} row {self.row}"

    def read_bytes(self) -> bytes:
        """Read the image file's bytes. Raise PictureError, which names the image, if there are none."""
        if self.row is not None:
            value = _images_of(self.path, self.row_group, self.column)[self.row - self.first_row].as_py()
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise PictureError(f"{self.name} has no bytes in column {self.column!r}")
            return data
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise PictureError(f"cannot read image {self.path}: {error.strerror or error}") from error

    def read_pixels(self, data: bytes) -> NDArray[np.uint8]:
        """Decode (3, height_px, width_px). Raise PictureError, which names the image, if `data` is no whole picture."""
        return read_pixels(open_picture(data, self.name), self.name)


class _Wrong(ValueError):
    """What is wrong; the text begins with the name of a key in the section."""


def list_images(source: CaptionedConfig, section: str = "dataset") -> list[CaptionedImage]:
    """Return all images with their captions, in a fixed order. Raise DatasetError, which names the section's key."""
    try:
        return _list_images(source)
    except _Wrong as error:
        raise DatasetError(f"{section}.{error}") from error


def _list_images(dataset: CaptionedConfig) -> list[CaptionedImage]:
    path = dataset.path
    if path.is_file():
        tables = [path]
    elif path.is_dir():
        tables = sorted(path.glob("*.parquet"))
    else:
        raise _Wrong(f"path {path}: no such folder or file: give a folder of images, or a .parquet file")
    if tables:
        found = [image for table in tables for image in _in_parquet(table, dataset)]
    elif (path / _METADATA).is_file():
        found = _with_metadata(path, dataset.caption_column)
    else:
        found = _with_text_files(path)
    if not found:
        raise _Wrong(f"path {path} has no images ({', '.join(_SUFFIXES)}) and no .parquet file")
    return found


def _with_text_files(folder: Path) -> list[CaptionedImage]:
    """List images such as cat.png with cat.txt beside it."""
    images = _image_files(folder)
    captions = {image: image.with_suffix(".txt") for image in images}
    _require_none(
        folder, [image for image in images if not captions[image].is_file()], "image without a caption (.txt)"
    )
    texts = {path for path in folder.rglob("*.txt") if not path.name.startswith(".")}
    _require_none(folder, sorted(texts - set(captions.values())), "caption without an image")
    if len(set(captions.values())) < len(images):
        first, second = next((a, b) for a, b in pairwise(images) if captions[a] == captions[b])
        raise _Wrong(f"path: {first} and {second} would share the caption {captions[first]}: rename one")
    return [CaptionedImage(str(image), _caption(_text(captions[image]), str(captions[image]))) for image in images]


def _with_metadata(folder: Path, column: str) -> list[CaptionedImage]:
    """List what metadata.jsonl names, as the imagefolder of Hugging Face's datasets does."""
    file = folder / _METADATA
    images = [_of_line(folder, line, f"{file} line {number}", column) for number, line in _lines(file)]
    listed = {Path(image.path) for image in images}
    if len(listed) < len(images):
        raise _Wrong(f"path: {file} names {len(images) - len(listed)} image(s) twice")
    _require_none(folder, sorted(set(_image_files(folder)) - listed), f"image without a line in {_METADATA}")
    _require_none(
        folder, sorted(path for path in listed if not path.is_file()), f"line of {_METADATA} without an image"
    )
    return images


def _of_line(folder: Path, line: str, place: str, column: str) -> CaptionedImage:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Wrong(f"path: {place} is not JSON: {error}") from error
    for field in ("file_name", column):
        if not isinstance(fields, dict) or not isinstance(fields.get(field), str):
            raise _Wrong(f"path: {place} has no text {field!r}: {line[:80]}")
    return CaptionedImage(str(folder / fields["file_name"]), _caption(fields[column], place))


def _in_parquet(file: Path, dataset: CaptionedConfig) -> list[CaptionedImage]:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _Wrong(f"path: {file} is no parquet file: {error}") from error
    for key in ("image_column", "caption_column"):
        if (name := getattr(dataset, key)) not in table.schema_arrow.names:
            present = ", ".join(table.schema_arrow.names)
            raise _Wrong(f"{key} {name!r} is no column of {file}, which has: {present}")
    images: list[CaptionedImage] = []
    for group in range(table.num_row_groups):
        first = len(images)
        texts = table.read_row_group(group, columns=[dataset.caption_column]).column(0).to_pylist()
        for row, text in enumerate(texts, start=first):
            caption = _caption(text, f"{file} row {row}")
            images.append(CaptionedImage(str(file), caption, row, group, first, dataset.image_column))
    return images


@lru_cache(maxsize=1)  # rows of a group are read one after the other
def _images_of(path: str, row_group: int, column: str) -> Any:
    return pq.ParquetFile(path).read_row_group(row_group, columns=[column]).column(0)


def _image_files(folder: Path) -> list[Path]:
    """Return the images below `folder`, but none that begins with a dot: macOS archives add ._cat.png to cat.png."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return sorted(path for path in found if not path.name.startswith("."))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    numbered = enumerate(_text(file).split("\n"), start=1)
    return ((number, line) for number, line in numbered if line.strip())


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise _Wrong(f"path: cannot read {file} as UTF-8 text: {error}") from error


def _caption(text: object, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _Wrong(f"path: the caption of {place} is no text, or empty: {text!r}")
    return " ".join(text.split())


def _require_none(folder: Path, wrong: list[Path], what: str) -> None:
    if wrong:
        raise _Wrong(f"path {folder}: {len(wrong)} × {what}, the first is {wrong[0]}")
