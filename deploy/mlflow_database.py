"""Make MLflow's database whole or not at all, so that an interrupted first start leaves nothing that fails later.

    ensure_database(Path(".run/mlflow/mlflow.db"))

MLflow's server would make it in place, in some fifty migrations. One that is cut off in between can be neither
continued nor made anew.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.settings import LocalError

_DRAFT = ".draft"


def ensure_database(file: Path) -> None:
    """Make the SQLite database `file` and its folder, unless it is there. Raise LocalError if MLflow cannot."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"*{_DRAFT}*"):  # of an attempt that was cut off, SQLite's journal too
        left.unlink()
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=_DRAFT, delete=False) as made:
        draft = Path(made.name)  # its own name, as a process of that attempt may still write
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{draft}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise LocalError(f"MLflow cannot make its database {file}: {last}")
    draft.replace(file)
