"""Every way to lay out images and captions gives the same list; what is wrong is named with file, line or row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.config.dataset import DatasetConfig
from services.pictures import PictureError
from tests.pictures import photo
from trainer.data.captioned_images import CaptionedImage, DatasetError, list_images

CAPTIONS = {"a.png": "a red heart", "b.jpg": "piñata", "c.png": "two cats"}


def dataset(path: Path, **columns: str) -> DatasetConfig:
    return DatasetConfig(path=path, latents_path=path / "latents", **columns)


def encoded(name: str) -> bytes:
    file = BytesIO()
    photo(20, 30 + ord(name[0]) % 7).save(file, "JPEG" if name.endswith("jpg") else "PNG")
    return file.getvalue()


def with_text_files(folder: Path) -> DatasetConfig:
    for name, caption in CAPTIONS.items():
        (folder / name).write_bytes(encoded(name))
        (folder / name).with_suffix(".txt").write_text(f" {caption}\n", encoding="utf-8")
    (folder / "._a.png").write_bytes(b"what a Mac puts into archives")
    return dataset(folder)


def with_metadata(folder: Path) -> DatasetConfig:
    (folder / "pictures").mkdir()
    for name in CAPTIONS:
        (folder / "pictures" / name).write_bytes(encoded(name))
    lines = [json.dumps({"file_name": f"pictures/{name}", "said": caption}) for name, caption in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return dataset(folder, caption_column="said")


def with_parquet(folder: Path) -> DatasetConfig:
    table = pa.table({"image": [encoded(name) for name in CAPTIONS], "text": list(CAPTIONS.values())})
    pq.write_table(table, folder / "all.parquet", row_group_size=2)
    return dataset(folder / "all.parquet")


def with_parquet_files_of_structs(folder: Path) -> DatasetConfig:
    for part, names in enumerate([["a.png", "b.jpg"], ["c.png"]]):
        images = [{"bytes": encoded(name), "path": name} for name in names]
        table = pa.table({"picture": images, "said": [CAPTIONS[name] for name in names]})
        pq.write_table(table, folder / f"{part}.parquet")
    return dataset(folder, image_column="picture", caption_column="said")


@pytest.mark.parametrize("lay_out", [with_text_files, with_metadata, with_parquet, with_parquet_files_of_structs])
def test_every_layout_gives_the_images_with_their_captions(
    lay_out: Callable[[Path], DatasetConfig], tmp_path: Path
) -> None:
    images = list_images(lay_out(tmp_path))
    assert [image.caption for image in images] == list(CAPTIONS.values())
    assert [image.read_bytes() for image in images] == [encoded(name) for name in CAPTIONS]
    pixels = images[0].read_pixels(images[0].read_bytes())
    assert np.array_equal(pixels, np.asarray(photo(20, 30 + ord("a") % 7)).transpose(2, 0, 1))


def test_byte_order_marks_are_no_text_and_only_line_breaks_end_a_line(tmp_path: Path) -> None:
    made = with_metadata(tmp_path)
    file = tmp_path / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    lines[0]["said"] = "a red\u2028heart"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8-sig", newline="")
    assert [image.caption for image in list_images(made)] == ["a red heart", "piñata", "two cats"]  # of one line each
    file.unlink()
    for name, caption in CAPTIONS.items():
        (tmp_path / "pictures" / name).with_suffix(".txt").write_text(caption, encoding="utf-8-sig")
    assert [image.caption for image in list_images(made)] == list(CAPTIONS.values())


def spoil_metadata(line: object) -> Callable[[Path], DatasetConfig]:
    def lay_out(folder: Path) -> DatasetConfig:
        made = with_metadata(folder)
        file = folder / "metadata.jsonl"
        text = line if isinstance(line, str) else json.dumps(line)
        file.write_text(file.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")
        return made

    return lay_out


def changed(change: Callable[[Path], Any]) -> Callable[[Path], DatasetConfig]:
    def lay_out(folder: Path) -> DatasetConfig:
        made = with_text_files(folder)
        change(folder)
        return made

    return lay_out


def parquet(columns: dict[str, Any], **names: str) -> Callable[[Path], DatasetConfig]:
    def lay_out(folder: Path) -> DatasetConfig:
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return dataset(folder / "x.parquet", **names)

    return lay_out


def not_parquet(folder: Path) -> DatasetConfig:
    (folder / "x.parquet").write_bytes(b"PAR1 no more")
    return dataset(folder)


@pytest.mark.parametrize(
    ("lay_out", "named"),
    [
        (changed(lambda f: (f / "b.txt").unlink()), ["1 × image without a caption (.txt)", "b.jpg"]),
        (changed(lambda f: (f / "b.jpg").unlink()), ["1 × caption without an image", "b.txt"]),
        (changed(lambda f: (f / "a.webp").touch()), ["a.png", "a.webp", "share the caption", "a.txt"]),
        (changed(lambda f: (f / "a.txt").write_bytes(b" \n")), ["caption of", "a.txt", "empty"]),
        (changed(lambda f: (f / "a.txt").write_bytes(b"\xff")), ["a.txt", "UTF-8"]),
        (lambda folder: dataset(folder), ["has no images"]),
        (lambda folder: dataset(folder / "absent"), ["absent", "no such folder"]),
        (spoil_metadata("{oops"), ["metadata.jsonl line 5", "is not JSON"]),
        (spoil_metadata(["d.png"]), ["metadata.jsonl line 5", "no text 'file_name'"]),
        (spoil_metadata({"file_name": "a.png"}), ["metadata.jsonl line 5", "no text 'said'"]),
        (spoil_metadata({"file_name": "d.png", "said": ""}), ["metadata.jsonl line 5", "empty"]),
        (spoil_metadata({"file_name": "d.png", "said": "x"}), ["1 × line of metadata.jsonl without an image", "d.png"]),
        (spoil_metadata({"file_name": "pictures/a.png", "said": "x"}), ["names 1 image(s) twice"]),
        (parquet({"picture": [b""], "text": ["x"]}), ["dataset.image_column 'image'", "which has: picture, text"]),
        (parquet({"image": [b""], "said": ["x"]}), ["dataset.caption_column 'text'", "which has: image, said"]),
        (parquet({"image": [b"", b""], "text": ["x", None]}), ["x.parquet row 1", "None"]),
        (parquet({"image": [b""], "text": [7]}), ["x.parquet row 0", "no text"]),
        (not_parquet, ["x.parquet is no parquet file"]),
    ],
)
def test_what_is_wrong_is_named(lay_out: Callable[[Path], DatasetConfig], named: list[str], tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        list_images(lay_out(tmp_path))
    for part in ["dataset.", *named]:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [None, "text", {"bytes": None, "path": "a.png"}])
def test_a_row_without_image_bytes_is_named(value: object, tmp_path: Path) -> None:
    images = list_images(parquet({"image": [value], "text": ["x"]})(tmp_path))
    with pytest.raises(PictureError, match=re.escape("x.parquet row 0 has no bytes in column 'image'")):
        images[0].read_bytes()


def test_bytes_that_are_no_picture_are_named_with_their_row() -> None:
    image = CaptionedImage("x.parquet", "x", row=17)
    with pytest.raises(PictureError, match=r"x\.parquet row 17 is not a PNG"):
        image.read_pixels(b"GIF89a")
