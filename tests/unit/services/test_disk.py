"""A full disk is named with path and free bytes, whichever library meets it; other errors stay what they are.

The disk is a small one in memory, mounted in a mount namespace of a process of its own; that needs rights which not
every machine gives.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.settings import ROOT
from services.disk import DiskFullError, full_disk_named

WRITERS = {
    "safetensors": "safetensors.torch.save_file({'a': torch.zeros(200_000)}, path / 'a.safetensors')",
    "torch": "torch.save({'a': torch.zeros(200_000)}, path / 'a.pt')",
    "python": "(path / 'a.txt').write_text('x' * 1_000_000)",
}
PROGRAM = """
import safetensors.torch, torch
from pathlib import Path
from services.disk import DiskFullError, full_disk_named
path = Path("small/run/model")
path.mkdir(parents=True)
try:
    with full_disk_named(path):
        {write}
except DiskFullError as error:
    print(error)
"""


def on_small_disk(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    mount = 'mount -t tmpfs -o size=256k tmpfs small && exec "$@"'
    (folder / "small").mkdir(exist_ok=True)
    shell = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *command]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_named_with_the_path_and_what_is_free(library: str, tmp_path: Path) -> None:
    if on_small_disk(tmp_path, ["true"]).returncode != 0:
        pytest.skip("this machine allows no mount")
    done = on_small_disk(tmp_path, [sys.executable, "-c", PROGRAM.format(write=WRITERS[library])])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no room to write small/run/model: its disk has 0.")
    assert done.stdout.endswith(" MiB left: free some, then resume the run\n")


def test_what_a_device_without_room_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with (
        pytest.raises(DiskFullError, match=r"no room to write .*/model: its disk has") as caught,
        full_disk_named(tmp_path / "not/yet/model"),
    ):
        (tmp_path / "full").write_text("x")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.errno) == (str(caught.value), caught.value.errno)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file"), RuntimeError("shapes differ")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
        raise error
    assert caught.value is error
