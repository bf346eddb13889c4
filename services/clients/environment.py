"""Say which environment variables reach a run's job and its workers, wherever these start.

Ray starts processes with the environment of its own node, not with that of whoever submits a job. Keys, tokens, caches
and proxies would stay behind, so each start hands them on by name. Their values are printed nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "SRPO_API_KEY",  # of the reward service
    "HPS_ROOT",  # where hpsv2 keeps its benchmark
    "GOOGLE_APPLICATION_CREDENTIALS",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
}
_PREFIXES = ("HF_", "MLFLOW_", "AWS_")  # tokens, folders, addresses, patience, credentials
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}  # in lower case too


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environment` that a run's processes need.

    >>> carried({"HF_TOKEN": "t", "https_proxy": "http://proxy:3128", "HOME": "/home/me"})
    {'HF_TOKEN': 't', 'https_proxy': 'http://proxy:3128'}
    """
    return {name: value for name, value in environment.items() if _is_carried(name)}


def _is_carried(name: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES) or name.upper() in _PROXIES
