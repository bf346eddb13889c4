"""Shares tests between processes (pytest -n 2): those that start Ray clusters to one, in turn; of the rest, each file.

Two clusters at once would be too many for two cores.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

_WITH_RAY = {f"tests/integration/test_{name}.py" for name in ("platform", "reward_service", "training")}


class Shared(LoadScopeScheduling):  # --dist loadgroup would do, but not with pytest 9.2 (pytest-xdist issue 1386)
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "with Ray" if file in _WITH_RAY else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Shared:
    return Shared(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in _WITH_RAY)  # the longest part starts first
