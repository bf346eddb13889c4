"""Shares tests between processes (pytest -n 2): tests/integration to one, in turn; of the rest, each file to one.

Integration tests start Ray clusters, of which two at once would be too many for two cores.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

_INTEGRATION = "tests/integration"


class Shared(LoadScopeScheduling):  # --dist loadgroup would do, but not with pytest 9.2 (pytest-xdist issue 1386)
    def _split_scope(self, nodeid: str) -> str:
        return _INTEGRATION if nodeid.startswith(_INTEGRATION) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Shared:
    return Shared(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(_INTEGRATION) not in Path(item.nodeid).parents)  # the longest part starts first
