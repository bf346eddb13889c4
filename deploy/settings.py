"""Say where the local services listen and keep their files, and check that their ports are free.

Settings(dashboard_port=28265).dashboard_url   # "http://127.0.0.1:28265"
check_port("serve", 8000)                      # LocalError names the listener and the option
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
EXIT_INTERRUPTED = 130  # as shells have it
_WORKER_PORTS = range(10_002, 20_000)  # of Ray's workers, which refuses to start if another of its ports is among them


class LocalError(RuntimeError):
    """A service cannot be started; the text names it and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Ports and files of the services; each from an option, or the variable SRPO_<NAME>, or its default."""

    dashboard_port: int = 8265  # Ray's dashboard and job API
    serve_port: int = 8000
    mlflow_port: int = 5000
    run_dir: Path = ROOT / ".run"
    serve_config: Path = ROOT / "deploy" / "serve.yaml"

    @property
    def dashboard_url(self) -> str:
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def serve_url(self) -> str:
        return f"http://{HOST}:{self.serve_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{HOST}:{self.mlflow_port}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of Settings to a parser; `settings` reads them."""
    default = Settings()
    for name in ("dashboard_port", "serve_port", "mlflow_port"):
        _add_option(parser, name, int, getattr(default, name))
    for name in ("run_dir", "serve_config"):
        _add_option(parser, name, Path, getattr(default, name))


def _add_option(parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], default: object) -> None:
    value = os.environ.get(f"SRPO_{name.upper()}", str(default))  # a text default goes through `type` as well
    parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help="(%(default)s)")


def settings(args: argparse.Namespace) -> Settings:
    """Return the Settings of a parsed command line, with absolute paths."""
    ports = args.dashboard_port, args.serve_port, args.mlflow_port
    return Settings(*ports, args.run_dir.absolute(), args.serve_config.absolute())


def check_port(name: str, port: int) -> None:
    """Raise LocalError if the port for `name` cannot be used, or something listens on it on loopback."""
    cure = f"choose another with --{name}-port or SRPO_{name.upper()}_PORT"
    if name == "dashboard" and port in _WORKER_PORTS:
        first, last = _WORKER_PORTS[0], _WORKER_PORTS[-1]
        raise LocalError(f"port {port} (dashboard) is one of Ray's workers' own, {first} to {last}: {cure}")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise LocalError(f"port {port} ({name}) is busy{_listener(port)}: stop what listens there, or {cure}")


def free_port() -> int:
    """Return a free port that no other program gets by chance before its server starts.

    Outgoing connections use ports from 32768 (macOS: 49152), Ray's workers from 10002 to 19999.
    Raise LocalError if there is none.
    """
    for port in random.sample(range(20_000, 32_768), k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise LocalError("no free port among 100 between 20000 and 32767")


def _listener(port: int) -> str:
    try:
        owners = {
            each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port == port
        }
        return "".join(f" (pid {pid}, {psutil.Process(pid).name()})" for pid in owners if pid)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return ""  # we may not see whose it is; the port alone is named
