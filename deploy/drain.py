"""Before Ray ends, Serve's replicas answer what they have begun: its applications are taken out of service first.

drain("http://127.0.0.1:8265")   # the dashboard of a Ray of ours
"""

from __future__ import annotations

import time
from typing import Any

import requests

from services.jobs import request_headers

APPLICATIONS_PATH = "/api/serve/applications/"
_TIMEOUT_S = 30.0  # a person waits; a request may take longer, and then gets no answer
_ASK_TIMEOUT_S = 10.0
_POLL_S = 0.2


def drain(dashboard_url: str) -> bool:
    """Whether all was answered within 30 s; also where nothing is served. False where nobody answers at the address."""
    api, deadline = f"{dashboard_url}{APPLICATIONS_PATH}", time.monotonic() + _TIMEOUT_S
    try:
        if _applications(api):
            # Not DELETE: that ends the proxies, and with them the connections, at once.
            requests.put(api, json={"applications": []}, headers=request_headers(), timeout=_ASK_TIMEOUT_S)
        while _applications(api):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    except requests.RequestException:
        return False
    return True


def _applications(api: str) -> dict[str, Any]:
    """By name, until their last replica is gone; none where Serve does not run."""
    answer = requests.get(api, headers=request_headers(), timeout=_ASK_TIMEOUT_S)
    answer.raise_for_status()
    applications: dict[str, Any] = answer.json().get("applications", {})
    return applications
