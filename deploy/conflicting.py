"""Run tests/conflicting in the environments that deploy/serve_conflicting.yaml gives its replicas: `make conflicting`.

Each is a virtual environment of the pinned packages on top of this one, as Ray makes them for a runtime_env; it stays
in .run/conflicting for the next time.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = {"image_reward": "ImageReward", "hpsv3": "hpsv3"}  # kind -> what it imports
_TIMEOUT_S = 3600


def main() -> None:
    """Make the environments and run the tests. Raise CalledProcessError of the first step that fails."""
    config = yaml.safe_load((ROOT / "deploy/serve_conflicting.yaml").read_text(encoding="utf-8"))
    (application,) = config["applications"]
    for deployment in application["deployments"]:
        if runtime_env := deployment["ray_actor_options"].get("runtime_env"):
            kind = application["args"]["rewards"][deployment["name"]]["kind"]
            _test(kind, _environment(ROOT / ".run" / "conflicting" / kind, runtime_env))


def _environment(folder: Path, runtime_env: dict[str, Any]) -> Path:
    """Make the environment or bring it up to date, and return its interpreter."""
    _run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Last in the path, so that this environment's packages show where the new one has none of its own.
    (site_packages / "zz_base.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    _run(str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *runtime_env["pip"])
    return python


def _test(kind: str, python: Path) -> None:
    _run(str(python), "-c", f"import {_PACKAGES[kind]}")  # the tests themselves are skipped without the package
    _run(str(python), "-m", "pytest", "-p", "no:cacheprovider", f"tests/conflicting/test_{kind}.py")


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True, timeout=_TIMEOUT_S)


if __name__ == "__main__":
    main()
