"""Where the local services listen and keep their files, and whether their ports are free.

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


class LocalError(RuntimeError):
    """A service cannot be started; the text names it and the cure."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where services listen and keep their files; each from an option, or the variable SRPO_<NAME>, or its default."""

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
    """The options of Settings; `settings` reads them back."""
    default = Settings()
    for name in ("dashboard_port", "serve_port", "mlflow_port"):
        _add_option(parser, name, int, getattr(default, name))
    for name in ("run_dir", "serve_config"):
        _add_option(parser, name, Path, getattr(default, name))


def _add_option(parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], default: object) -> None:
    value = os.environ.get(f"SRPO_{name.upper()}", str(default))  # a text default goes through `type` as well
    parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help="(%(default)s)")


def settings(args: argparse.Namespace) -> Settings:
    """The Settings of a parsed command line, paths made absolute."""
    ports = args.dashboard_port, args.serve_port, args.mlflow_port
    return Settings(*ports, args.run_dir.absolute(), args.serve_config.absolute())


def check_port(name: str, port: int) -> None:
    """Raise LocalError if something listens on the loopback port that `name` is to have."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) != 0:
            return
    raise LocalError(
        f"port {port} ({name}) is busy{_listener(port)}: stop what listens there, "
        f"or choose another with --{name}-port or SRPO_{name.upper()}_PORT"
    )


def free_port() -> int:
    """A port that nobody uses now, nor will by chance before its server starts.

    Outgoing connections take theirs from 32768 up (macOS: 49152), Ray's workers from 10002 to 19999.
    Raises LocalError where none is found.
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
        return ""  # not ours to see; the port alone says enough
