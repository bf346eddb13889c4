"""Keep an index of a spool: which steps, pictures, settings and tags it has, so that it takes nothing twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RUN_TAG = "srpo.run"  # on the MLflow run: which spool it is from


@dataclass
class SpoolIndex:
    """What a spool has. `note` is called with each of its records, in order."""

    run: str | None = None
    metrics: dict[tuple[str, int], int] = field(default_factory=dict)  # by group and step: where the line starts
    images: set[tuple[str, int]] = field(default_factory=set)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str | None] = field(default_factory=dict)
    attachments: set[str] = field(default_factory=set)

    def has(self, kind: str, payload: Mapping[str, Any]) -> bool:
        """Return whether this record repeats one, as a resumed training repeats its steps."""
        if kind == "image":
            return (payload["key"], payload["step"]) in self.images
        return self.run is not None if kind == "start" else step_of(kind, payload) in self.metrics

    def note(self, kind: str, payload: Mapping[str, Any], start: int) -> None:
        """Take up a record, whose line starts at byte `start` of the spool."""
        if kind == "start":
            self.run = payload["tags"][RUN_TAG]
        elif kind == "metrics":
            self.metrics[payload["group"], payload["step"]] = start
        elif kind == "image":
            self.images.add((payload["key"], payload["step"]))
        elif kind == "params":
            self.params |= payload["params"]
        elif kind == "tag":
            self.tags[payload["key"]] = payload["value"]
        if "file" in payload:
            self.attachments.add(payload["file"].partition("/")[0])


def step_of(kind: str, payload: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return group and step of a record of metrics; None for any other."""
    return (payload["group"], payload["step"]) if kind == "metrics" else None
