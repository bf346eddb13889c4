"""The bytes of a message: a safetensors file, whose header holds the JSON fields and whose body holds the arrays.

A hostile body can be rejected but never executed. What the fields and arrays mean is in contract.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as shorten  # values in errors
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

MAX_HEADER_BYTES = 4 << 20  # JSON takes many times its size in memory; 4 MiB hold the texts of thousands of images
_MAX_NAMES_SHOWN = 5
_MAX_REASON_CHARS = 300
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, 64 bit little endian

Images = NDArray[Any] | tuple[NDArray[Any], ...]
"""Stacked: one array (batch, 3, height_px, width_px). Mixed: a tuple of arrays (3, height_px, width_px), any sizes."""


class ContractError(ValueError):
    """A message that breaks the contract; the text names the field and the offending value.

    `reason`: the kind of mistake as a word, for counters.
    """

    reason = "message"


def pack(arrays: Mapping[str, NDArray[Any]], message: dict[str, Any]) -> bytes:
    """Return the bytes of named arrays and JSON fields."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"message": json.dumps(message)})


def unpack(body: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays and the JSON fields. Raise ContractError if the body is no message."""
    header_bytes = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ContractError(f"header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        arrays = load(body)  # validates the header's lengths and offsets before anything reads it
        header = json.loads(body[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes])
        message = json.loads(header["__metadata__"]["message"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error)[:_MAX_REASON_CHARS]  # it may repeat the caller's text
        raise ContractError(f"body is not a safetensors message of this API: {reason}") from error
    if not isinstance(message, dict):
        raise ContractError(f"message must be a JSON object, not {type(message).__name__}")
    return arrays, message


def name_images(name: str, images: Images) -> dict[str, NDArray[Any]]:
    """Return the tensors of stacked images, NAME, or of mixed ones, NAME.0, NAME.1, …"""
    if isinstance(images, np.ndarray):
        return {name: images}
    return {f"{name}.{index}": image for index, image in enumerate(images)}


def take_images(name: str, arrays: dict[str, NDArray[Any]]) -> Images | None:
    """Remove NAME, or NAME.0, NAME.1, … up to the first gap, from `arrays` and return them; None if there are none."""
    if name in arrays:
        return arrays.pop(name)
    images: list[NDArray[Any]] = []
    while (image := arrays.pop(f"{name}.{len(images)}", None)) is not None:
        images.append(image)
    return tuple(images) or None


def check_keys(kind: str, found: Mapping[str, Any], expected: set[str]) -> None:
    """Raise ContractError, which names what is unknown or missing, unless the keys are exactly the expected ones."""
    for verdict, names in (("unknown", found.keys() - expected), ("missing", expected - found.keys())):
        if names:
            raise ContractError(f"{verdict} {kind}: {', '.join(map(shorten, sorted(names)[:_MAX_NAMES_SHOWN]))}")


def typed(message: Mapping[str, Any], field: str, kind: type) -> Any:
    """Return a field's value. Raise ContractError if it is of another type."""
    value = message[field]
    if not isinstance(value, kind):
        raise ContractError(f"{field} must be {kind.__name__}, not {shorten(value)}")
    return value
