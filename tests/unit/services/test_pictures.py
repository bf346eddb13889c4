"""Reading untrusted picture files: pixels are those a viewer shows, and bad files are named before they are decoded."""

from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_server.http.limits import LimitExceeded, Limits
from reward_server.http.requests import read_pictures
from services.contract import ContractError
from services.pictures import PictureError, open_picture, read_pixels

_NUM_DAMAGED = 2000
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)  # height, width, color


def file_of(picture: Image.Image | np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def read(data: bytes) -> np.ndarray[Any, Any]:
    """Return pixels (height, width, 3)."""
    pixels = read_pixels(open_picture(data, "picture"), "picture")
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


def png_of(width: int, height: int, color_type: int = 2, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pictures_keep_their_pixels(kind: str, options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(read(file_of(PIXELS, kind, **options)), PIXELS)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    data = file_of(PIXELS, "JPEG", quality=90)
    np.testing.assert_array_equal(read(data), np.asarray(Image.open(BytesIO(data))))


def test_a_phone_photo_with_a_preview_gives_the_photo() -> None:
    photo = Image.fromarray(np.full((6, 4, 3), 200, np.uint8))
    data = file_of(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
    np.testing.assert_array_equal(read(data), np.asarray(photo))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "PA", "I;16"])
def test_every_mode_becomes_three_colors(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    gray = Image.fromarray(PIXELS).convert("L")
    picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    if mode == "PA":
        picture = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])).quantize()
    pixels = read(file_of(picture, kind))
    assert pixels.shape == PIXELS.shape
    if mode in ("L", "LA", "RGBA", "I;16"):
        np.testing.assert_array_equal(pixels, np.asarray(gray)[..., None].repeat(3, axis=2))


def test_transparency_is_laid_on_white() -> None:
    alpha = np.zeros((6, 4, 1), np.uint8)
    alpha[:3] = 255
    pixels = read(file_of(np.concatenate([PIXELS, alpha], axis=2)))
    np.testing.assert_array_equal(pixels[:3], PIXELS[:3])
    assert (pixels[3:] == 255).all()


def test_a_transparent_color_of_a_palette_is_laid_on_white() -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30])
    assert (read(file_of(picture, transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    """The reference is Pillow's own undoing."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(PIXELS, "JPEG", exif=exif, quality=95)
    np.testing.assert_array_equal(read(data), np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_picture_is_an_error(kind: str, part: float) -> None:
    data = file_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind)
    with pytest.raises(PictureError, match="picture is"):
        read(data[: int(part * len(data))])


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a PNG, JPEG or WebP"),
        (b"GIF89a" + bytes(100), "not a PNG, JPEG or WebP"),
        (file_of(PIXELS, "GIF"), "not a PNG, JPEG or WebP"),
        (file_of(PIXELS, "TIFF"), "not a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG or WebP"),
        (png_of(100_000, 100_000), "far too many pixels"),
        (
            file_of(PIXELS, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
            "animation",
        ),
        (file_of(PIXELS, "PNG", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]), "animation"),
        (file_of(PIXELS, "JPEG")[:-2] + b"\xff\xda" * 101, "scans"),
    ],
)
def test_an_unsupported_file_is_named(data: bytes, named: str) -> None:
    with pytest.raises(PictureError, match=f"picture.*{named}"):
        open_picture(data, "picture")


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    """The file holds nothing to decode, so that decoding it would be another error."""
    with pytest.raises(LimitExceeded, match=r"images\[1\] is 10000 x 8000"):
        read_pictures([file_of(PIXELS), png_of(10_000, 8000)], Limits())


def test_damaged_pictures_are_errors_or_pictures() -> None:
    """Any other exception fails the test."""
    chance = random.Random(0)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("PNG", {"exif": exif}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True, "exif": exif}),
    ]
    files = [file_of(picture, kind, **options) for kind, options in kinds]
    num_refused = 0
    for _ in range(_NUM_DAMAGED):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_pictures([bytes(data[: chance.randint(len(data) // 2, 2 * len(data))])], Limits())
        except ContractError:
            num_refused += 1
    assert _NUM_DAMAGED / 10 < num_refused < _NUM_DAMAGED
