"""The service's log, caught."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from reward_server.http.access_log import log_as_json


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Catch the lines that the service logs, and restore its logger."""
    logger = logging.getLogger("reward_server")
    before = logger.handlers, logger.propagate, logger.level
    stream = io.StringIO()
    log_as_json(stream)
    yield stream
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
