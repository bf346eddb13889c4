"""Talk to Ray's dashboard about Serve: give it its configuration, and ask how its applications are.

deploy(api, config)    # api: "http://127.0.0.1:8265/api/serve/applications/"
rewards_run(api)       # False while they start; LocalError for one that cannot
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from deploy.settings import LocalError
from services.clients.jobs import request_headers

_DEPLOY_TIMEOUT_S = 180.0


def get(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return the answer's JSON or text, or None if there is no answer yet or it is an error."""
    try:
        answer = requests.get(url, headers=headers, timeout=10)
    except requests.RequestException:
        return None
    if not answer.ok:
        return None
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def deploy(api: str, config: dict[str, Any]) -> None:
    """Send Ray Serve its configuration; the one already in force changes nothing."""
    try:
        answer = requests.put(api, json=config, headers=request_headers(), timeout=_DEPLOY_TIMEOUT_S)
    except requests.RequestException as error:
        raise LocalError(f"Ray Serve did not take its configuration: {error}") from error
    if not answer.ok:
        raise LocalError(f"Ray Serve refused its configuration: {answer.text.strip().splitlines()[-1]}")


def rewards_run(api: str) -> bool:
    """Tell whether every application runs. Raise LocalError with Serve's own message for one that cannot."""
    applications = (get(api, request_headers()) or {}).get("applications", {})
    for name, application in applications.items():
        if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [application["message"], *(each["message"] for each in application["deployments"].values())]
            cause = "\n".join(messages).strip().splitlines()[-1]  # the others are the way to it
            raise LocalError(f"reward service: application {name} {application['status']}: {cause}")
    return bool(applications) and all(each["status"] == "RUNNING" for each in applications.values())
