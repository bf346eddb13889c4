"""Make stages in order and once: a stage's output replaces the old one when it is complete, and is marked done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stage:
    """make(path) writes a file or a folder there, which then replaces `output`.

    A stage without an output writes its files itself, and is made every time.
    """

    make: Callable[[Path], None]
    output: Path | None = None


def run(stages: Mapping[str, Stage], build: Path) -> None:
    """Make each stage without build/NAME.done. Until a stage has ended, its output stays as it was."""
    build.mkdir(exist_ok=True)
    for name, stage in stages.items():
        done, draft = build / f"{name}.done", build / f"{name}.draft"
        if done.exists():
            print(f"{name}: done before (delete {done} to have it made again)", flush=True)
            continue
        _remove(draft)  # of a stage that was killed
        started = time.monotonic()
        stage.make(draft)
        if stage.output is not None:
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            _remove(stage.output)
            draft.replace(stage.output)
            done.touch()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
