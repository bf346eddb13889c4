from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import LocalServices, ensure_token, main
from deploy.settings import ROOT, LocalError, Settings, check_port, free_port

PORTS = ("dashboard", "serve", "mlflow")


def make_up(folder: Path, ports: dict[str, int]) -> subprocess.CompletedProcess[str]:
    options = [f"--{name}-port={port}" for name, port in ports.items()]
    command = [sys.executable, "-m", "deploy.local", "up", f"--run-dir={folder / 'run'}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("name", PORTS)
def test_a_busy_port_is_named_with_the_cure_and_nothing_is_started(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = make_up(tmp_path, {each: free_port() for each in PORTS} | {name: port})
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    for part in (f"port {port}", f"--{name}-port", f"SRPO_{name.upper()}_PORT", f"pid {os.getpid()}"):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_free_port_is_no_error() -> None:
    check_port("serve", free_port())


def test_a_port_of_rays_workers_is_refused_for_the_dashboard_in_one_line(tmp_path: Path) -> None:
    result = make_up(tmp_path, {each: free_port() for each in PORTS} | {"dashboard": 18_265})
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    for part in ("port 18265 (dashboard)", "10002 to 19999", "--dashboard-port", "SRPO_DASHBOARD_PORT"):
        assert part in line
    assert not (tmp_path / "run").exists()
    for port in (10_002, 19_999):
        with pytest.raises(LocalError, match="one of Ray's workers' own"):
            check_port("dashboard", port)
    check_port("serve", free_port())


def test_down_with_nothing_up_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.local", "down", f"--run-dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert "nothing was up" in result.stdout


def test_the_token_is_made_once_and_kept_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    ensure_token()
    token = path.read_text(encoding="utf-8")
    ensure_token()
    assert path.read_text(encoding="utf-8") == token
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_service_that_dies_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    where = Settings(free_port(), free_port(), free_port(), tmp_path, tmp_path / "no_serve.yaml")
    services = LocalServices(where)
    services.mlflow.start([sys.executable, "-c", "raise SystemExit('no room left')"], tmp_path, {})
    with pytest.raises(LocalError, match="no room left"):
        services._wait("MLflow", services.mlflow, lambda: False)


@pytest.mark.parametrize("content", [None, b"", b"- a list", b"\xff"])
def test_a_serve_config_that_cannot_be_used_is_named_and_nothing_is_started(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "serve.yaml").write_bytes(content)
    where = Settings(free_port(), free_port(), free_port(), tmp_path / "run", tmp_path / "serve.yaml")
    with pytest.raises(LocalError, match=r"serve\.yaml.*SRPO_SERVE_CONFIG"):
        LocalServices(where).up()
    assert not (tmp_path / "run").exists()


def test_down_names_a_record_that_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ray.json").write_text("{", encoding="utf-8")
    assert main(["down", f"--run-dir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "ray.json") in line
