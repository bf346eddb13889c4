"""Make a run's paths absolute, because workers run in folders of their own; replace a folder as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from services.config.prompts import absolute
from services.config.run import RunConfig

Section = TypeVar("Section", bound=BaseModel)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the run with absolute paths. A model.path that is no path on this machine stays a hub id."""
    model = config.model
    path = str(Path(model.path).resolve()) if Path(model.path).exists() else model.path
    evaluation = config.evaluation.model_copy(update={"truth": _resolved(config.evaluation.truth, "path")})
    return config.model_copy(
        update={
            "output_dir": config.output_dir.resolve(),
            "model": model.model_copy(update={"path": path}),
            "prompts": _resolved(config.prompts, "path", "embeddings_path"),
            "dataset": _resolved(config.dataset, "path", "latents_path"),
            "evaluation": _resolved(evaluation, "prompts_path", "judge_path", "reference_path"),
            "guard": _resolved(config.guard, "prompts_path"),
            "tracking": config.tracking.model_copy(update={"uri": _absolute_store(config.tracking.uri)}),
        }
    )


def _resolved(section: Section | None, *names: str) -> Section | None:
    """Return the section with these keys absolute; a key that is null stays null, a benchmark's name as it is."""
    if section is None:
        return None
    paths = {name: value for name in names if (value := getattr(section, name)) is not None}
    return section.model_copy(update={name: absolute(value) for name, value in paths.items()})


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Let the caller fill a new folder within the context; it then takes the place of `path` and all that it held."""
    draft = path.with_name(f"{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)


def _absolute_store(uri: str) -> str:
    """Return sqlite:///FILE with an absolute FILE; a server's address, and a store in memory, as it is.

    >>> _absolute_store("http://127.0.0.1:5000")
    'http://127.0.0.1:5000'
    """
    scheme = "sqlite:///"
    file, mark, options = uri.removeprefix(scheme).partition("?")
    if not uri.startswith(scheme) or file in ("", ":memory:"):
        return uri
    return f"{scheme}{Path(file).resolve()}{mark}{options}"
