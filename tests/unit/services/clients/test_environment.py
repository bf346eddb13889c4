from __future__ import annotations

import pytest

from services.clients.environment import carried


@pytest.mark.parametrize(
    "name",
    [
        *("SRPO_API_KEY", "HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HPS_ROOT", "MLFLOW_TRACKING_PASSWORD"),
        *("HTTP_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS"),
        *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    ],
)
def test_what_a_run_needs_is_carried(name: str) -> None:
    assert carried({name: "x", "HOME": "/home/me"}) == {name: "x"}


@pytest.mark.parametrize("name", ["SRPO_API_KEYS", "HOME", "PATH", "RAY_ADDRESS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"])
def test_what_belongs_to_a_machine_stays_there(name: str) -> None:
    assert carried({name: "x"}) == {}
