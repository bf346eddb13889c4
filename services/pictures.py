"""Read untrusted PNG, JPEG and WebP files: check the header before decoding, and refuse what is incomplete.

    picture = open_picture(data, "images[0]")     # reads the header: picture.size is known, nothing is decoded
    image = read_pixels(picture, "images[0]")     # (3, height_px, width_px) uint8, as a viewer shows it
    image = read_picture(Path("cat.jpg"))         # both, for a file

Left out: color profiles (pixels are taken as sRGB) and animations (they are refused, not judged by one frame).
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.contract import ContractError

_FORMATS = ("PNG", "JPEG", "WEBP")
_JPEG_KINDS = ("JPEG", "MPO")  # MPO: phones append a depth map or a preview to a JPEG; the first picture is the photo
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # how to undo each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_SCAN = b"\xff\xda"  # cannot occur in a scan's own data
_MAX_JPEG_SCANS = 100  # each is a pass over all pixels, and may be a few bytes long; encoders write about ten
# Everything that Pillow's decoders raise for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class PictureError(ContractError):
    """Bytes that are no picture, an incomplete one, or one of an unsupported kind; the text names which and why."""

    reason = "picture"


def open_picture(data: bytes, name: str) -> Image.Image:
    """Read the header. Raise PictureError if it is unusable; the caller decides whether the size is allowed."""
    try:
        picture = Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} has far too many pixels: {error}") from error
    except _DAMAGE as error:
        raise PictureError(f"{name} is not a PNG, JPEG or WebP picture") from error
    if picture.format in _JPEG_KINDS:
        if data.count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
            raise PictureError(f"{name} is a JPEG of more than {_MAX_JPEG_SCANS} scans")
    elif getattr(picture, "n_frames", 1) != 1:
        raise PictureError(f"{name} is an animation; send one frame")
    return picture


def read_pixels(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """Return (3, height_px, width_px) uint8, turned upright as EXIF says, with transparency laid on white.

    Raise PictureError if the file is damaged.
    """
    try:
        picture.load()  # an incomplete file is an error, not a gray area
        orientation = picture.getexif().get(_EXIF_ORIENTATION)
        flat = _flatten(picture)
    except _DAMAGE as error:
        raise PictureError(f"{name} is damaged or incomplete ({type(error).__name__})") from error
    upright = flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat
    return np.array(upright).transpose(2, 0, 1)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return the (3, height_px, width_px) uint8 of a file. Raise PictureError, which names the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot read image {path}: {error.strerror or error}") from error
    return read_pixels(open_picture(data, str(path)), str(path))


def _flatten(picture: Image.Image) -> Image.Image:
    """Return RGB. 16 bits are cut to the high 8, as Pillow does for 16-bit colors (but not for 16-bit grays)."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")  # convert copies all pixels
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
