"""Emoji packages -> one file of pictures: every subject in four styles, 64 x 64 pixels, and its captions.

Subjects are the emoji that exist in all four styles; flags, skin tones and components are left out. A tenth of
the subjects is held out by a fixed seed, from every stage of the recipe.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SIZE_PX = 64
MARGIN_PX = 1
HELDOUT_SHARE = 0.1
STYLES = ("3D", "Flat", "Noto", "Twemoji")
SOURCES = {  # style -> npm package, folder in it, file ending
    "3D": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/", ".webp"),
    "Flat": ("@lobehub/fluent-emoji-flat@1.1.0", "package/assets/", ".svg"),
    "Noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/", ".png"),
    "Twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/", ".png"),
}
NAMES = "emojibase-data@17.0.0"
COMPONENTS, FLAGS = 2, 9  # emojibase's groups


class RecipeError(RuntimeError):
    """A stage cannot be made here; the text names what is missing and what to do."""


@dataclass(frozen=True)
class Emoji:
    """images (subjects, 4 styles, 3, 64, 64) uint8 on white; labels and tags by subject; heldout (subjects,) bool.

    >>> emoji = load(Path("deploy/tiny/build/data.safetensors")); emoji.labels[0]
    'grinning face'
    """

    images: Tensor
    labels: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    heldout: Tensor

    def caption(self, subject: int, rng: random.Random) -> str:
        """Return the label (70 %), the label with two tags (15 %) or up to four tags (15 %)."""
        draw, tags = rng.random(), self.tags[subject]
        if draw < 0.70 or len(tags) < 2:
            return self.labels[subject]
        if draw < 0.85:
            return ", ".join([self.labels[subject], *rng.sample(tags, 2)])
        return ", ".join(rng.sample(tags, min(4, len(tags))))


def fetch(folder: Path) -> None:
    """Download the five npm packages into `folder` (npm checks their integrity). Raises RecipeError without npm."""
    packages = [NAMES, *(package for package, _, _ in SOURCES.values())]
    missing = [package for package in packages if not _archive(folder, package).exists()]
    if missing and shutil.which("npm") is None:
        raise RecipeError(f"{missing[0]} comes from npm, which is not installed: install Node.js, which brings it")
    folder.mkdir(parents=True, exist_ok=True)
    for package in missing:
        print(f"fetching {package}", flush=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, timeout=600)


def render(folder: Path, out: Path) -> None:
    """Draw all pictures from the packages in `folder` and write them with their captions to `out`."""
    files = {style: _read_package(folder, *SOURCES[style]) for style in STYLES}
    subjects = [
        entry
        for entry in _read_names(folder)
        if entry.get("group") not in (None, COMPONENTS, FLAGS)
        and all(_key(entry["hexcode"]) in files[style] for style in STYLES)
    ]
    jobs = [files[style][_key(entry["hexcode"])] for entry in subjects for style in STYLES]
    with ProcessPoolExecutor(max_workers=2) as pool:
        pictures = list(pool.map(_draw, jobs, chunksize=64))
    shape = (len(subjects), len(STYLES), SIZE_PX, SIZE_PX, 3)
    images = torch.from_numpy(np.stack(pictures).reshape(shape)).permute(0, 1, 4, 2, 3).contiguous()
    order = random.Random(0).sample(range(len(subjects)), len(subjects))
    heldout = torch.zeros(len(subjects), dtype=torch.bool)
    heldout[order[: int(len(subjects) * HELDOUT_SHARE)]] = True
    captions = [[entry["label"].lower(), *map(str.lower, entry.get("tags", []))] for entry in subjects]
    save_file({"images": images, "heldout": heldout}, out, metadata={"captions": json.dumps(captions)})
    print(f"{len(subjects)} subjects in {len(STYLES)} styles, {int(heldout.sum())} held out", flush=True)


def load(path: Path) -> Emoji:
    with safe_open(path, framework="pt") as file:
        captions = json.loads(file.metadata()["captions"])
        return Emoji(
            images=file.get_tensor("images"),
            heldout=file.get_tensor("heldout"),
            labels=tuple(caption[0] for caption in captions),
            tags=tuple(tuple(caption[1:]) for caption in captions),
        )


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _key(hexcode: str) -> str:
    """Return the code points without the variation selector, which not all packages write."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _archive(folder: Path, package: str) -> Path:
    name, version = package.rsplit("@", 1)
    return folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def _read_package(folder: Path, package: str, prefix: str, ending: str) -> dict[str, tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    with tarfile.open(_archive(folder, package)) as archive:
        for member in archive:
            if member.name.startswith(prefix) and member.name.endswith(ending):
                data = archive.extractfile(member)
                assert data is not None
                found[_key(member.name.removeprefix(prefix).removesuffix(ending))] = (ending, data.read())
    return found


def _read_names(folder: Path) -> list[dict[str, Any]]:
    with tarfile.open(_archive(folder, NAMES)) as archive:
        data = archive.extractfile("package/en/data.json")
        assert data is not None
        return sorted(json.load(data), key=lambda entry: entry.get("order", 0))


def _draw(job: tuple[str, bytes]) -> np.ndarray:
    """Draw a picture file as (64, 64, 3) uint8: cropped to what is painted, centered, on white."""
    ending, data = job
    if ending == ".svg":
        import resvg_py  # on use: only this stage needs it

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=256, height=256))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    picture = picture.crop(box)
    inner = SIZE_PX - 2 * MARGIN_PX
    scale = inner / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # premultiplied alpha: otherwise the hidden color of transparent pixels bleeds into the outline
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE_PX, SIZE_PX), "white")
    canvas.alpha_composite(picture, ((SIZE_PX - size[0]) // 2, (SIZE_PX - size[1]) // 2))
    return np.asarray(canvas.convert("RGB"))
