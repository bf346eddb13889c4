"""Remember what of a spool has arrived in MLflow, in a file beside the spool that survives any kill."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from services.clients.spool_file import read_records, sync_folder

FILE = "delivered"


@dataclass(frozen=True, slots=True)
class Delivered:
    """How far the delivery has come.

    >>> Delivered("sqlite:///mlflow.db", sequence=2, end=310).later
    {}
    """

    uri: str  # of MLflow
    run_id: str | None = None  # in MLflow
    url: str | None = None  # of the run's page
    sequence: int = 0  # the last record that is done: arrived, refused, or in `later`
    end: int = 0  # the byte of the spool after it
    later: dict[str, int] = field(
        default_factory=dict
    )  # uploads put off: where the record starts, number of files sent
    refused: dict[str, list[str | int]] = field(default_factory=dict)  # what MLflow does not take: number, reason

    @classmethod
    def load(cls, folder: Path) -> Delivered | None:
        """Return what the file says; None if there is none, or none that can be read."""
        try:
            return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all. Raise OSError if that fails."""
        draft = folder / f"{FILE}.draft"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / FILE)
        sync_folder(folder)

    def num_left(self, folder: Path) -> int:
        """Return the number of records in the spool that have not arrived."""
        return len(read_records(folder, self.end)) + len(self.later)
