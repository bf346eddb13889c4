"""`make gpu-wheels`: collect what the check needs beside Python 3.12 and torch 2.11, in one file of at most 60 MB.

    python -m deploy.gpu_check.wheels --out .gpu
    python -m deploy.gpu_check.wheels --out .gpu --without numpy pillow torchvision    what the machine has already

The wheels are unpacked and packed again as one .tar.xz, which is a third smaller than they are. Versions are those of
deploy/constraints.txt, so that what is checked is what is tested; only torchvision follows the GPU machine's torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from deploy.gpu_check.packages import ARCHIVE, VECTORS

MAX_BYTES = 60_000_000
PYTHON = "3.12"
_ROOT = Path(__file__).resolve().parents[2]
_CONSTRAINTS = _ROOT / "deploy" / "constraints.txt"
_VECTORS_FROM = _ROOT.parent / "shared" / "reference"
_FOR_TORCH_2_11 = {"torchvision": "0.26.0"}  # compiled against torch 2.11; the other wheels do not link it
PACKAGES = (  # what torch itself needs (filelock, fsspec, jinja2, typing-extensions …) is there with torch
    *("diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "torchvision", "timm"),
    *("huggingface_hub", "safetensors", "tokenizers", "regex", "ftfy", "wcwidth", "protobuf", "sentencepiece"),
    *("numpy", "pillow", "PyYAML", "psutil", "packaging", "tqdm", "importlib_metadata", "zipp"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("httpx", "httpcore", "httpx2", "httpcore2", "truststore", "h11", "anyio", "idna", "certifi"),
    *("requests", "urllib3", "charset-normalizer", "typer", "click"),
)
# pip takes a platform's name literally: these are the tags that wheels for x86-64 Linux with glibc 2.28 may have.
_PLATFORMS = (
    "manylinux1",
    "manylinux2010",
    "manylinux2014",
    *(f"manylinux_2_{minor}" for minor in (5, 12, 17, 24, 27, 28)),
)
_COMPRESSION: Final = 3  # of xz; 6 takes three times as long for a tenth less
_NEEDLESS = ("tests", "__pycache__")


class WheelsError(ValueError):
    """The packages cannot be collected; the text names the package or the size."""


def pinned(names: Iterable[str], constraints: str) -> list[str]:
    """Return name==version of each. Raise WheelsError for a name that has no version."""
    versions = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    known = {_normal(name): version for name, version in (versions | _FOR_TORCH_2_11).items()}
    if unknown := [name for name in names if _normal(name) not in known]:
        raise WheelsError(f"deploy/constraints.txt has no version of {', '.join(unknown)}")
    return [f"{name}=={known[_normal(name)]}" for name in names]


def download(requirements: Sequence[str], folder: Path) -> None:
    """Fetch a wheel of each, and nothing that it needs. Raise WheelsError with pip's last line."""
    platforms = [option for each in _PLATFORMS for option in ("--platform", f"{each}_x86_64")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    pip += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, *platforms]
    done = subprocess.run([*pip, "--dest", str(folder), *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelsError(f"pip download: {done.stderr.strip().splitlines()[-1]}")


def pack(wheels: Sequence[Path], archive: Path) -> None:
    """Unpack wheels over one another and pack them as a .tar.xz, without their tests."""
    with tempfile.TemporaryDirectory(prefix="srpo-wheels-") as name:
        site = Path(name)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as zipped:
                zipped.extractall(site)
        with tarfile.open(archive, "w:xz", preset=_COMPRESSION) as packed:
            for each in sorted(site.iterdir()):
                packed.add(each, each.name, filter=_needed)


def require_small(folder: Path, max_bytes: int) -> int:
    """Return the bytes of a folder's files. Raise WheelsError, and remove the folder, if they are too many."""
    sizes = {each: each.stat().st_size for each in folder.rglob("*") if each.is_file()}
    if (total := sum(sizes.values())) > max_bytes:
        largest = max(sizes, key=lambda each: sizes[each])
        shutil.rmtree(folder)
        raise WheelsError(
            f"{folder} would hold {total / 1e6:.1f} MB, of which {largest.name} {sizes[largest] / 1e6:.1f} MB; "
            f"{max_bytes / 1e6:.1f} MB may travel: leave out, with --without, what the machine has"
        )
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser("deploy.gpu_check.wheels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=_ROOT / ".gpu", help="a folder, which is made anew")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages that the machine has")
    parser.add_argument("--max-mb", type=float, default=MAX_BYTES / 1e6, help="how much may travel")
    args = parser.parse_args(arguments)
    left_out = {_normal(name) for name in args.without}
    try:
        if unknown := left_out - {_normal(name) for name in PACKAGES}:
            raise WheelsError(f"--without {', '.join(sorted(unknown))}: not among the packages {', '.join(PACKAGES)}")
        names = [name for name in PACKAGES if _normal(name) not in left_out]
        requirements = pinned(names, _CONSTRAINTS.read_text(encoding="utf-8"))
        _make_anew(args.out)
        with tempfile.TemporaryDirectory(prefix="srpo-wheels-") as folder:
            download(requirements, Path(folder))
            pack(sorted(Path(folder).glob("*.whl")), args.out / ARCHIVE)
        vectors = [each for each in _VECTORS_FROM.glob("*") if each.suffix in (".safetensors", ".json")]
        for each in vectors:
            shutil.copyfile(each, args.out / VECTORS / each.name)
        total = require_small(args.out, round(args.max_mb * 1e6))
    except WheelsError as error:
        print(f"make gpu-wheels: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(requirements)} packages, {len(vectors)} files of vectors, {total / 1e6:.1f} MB")
    return 0


def _make_anew(folder: Path) -> None:
    """Empty a folder that an earlier call made. Raise WheelsError for one that holds other things."""
    if folder.exists():
        if not (folder / VECTORS).is_dir():
            raise WheelsError(f"--out {folder} was not made by this program: give a folder that does not exist")
        shutil.rmtree(folder)
    (folder / VECTORS).mkdir(parents=True)


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if set(Path(entry.name).parts).intersection(_NEEDLESS) else entry


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
