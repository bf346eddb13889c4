"""Distribute tests over processes (pytest -n 2): all that start Ray clusters to one process, the others by file.

Two Ray clusters at once would be too many for two cores.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

_WITH_RAY = tuple(f"tests/integration/{path}" for path in ("test_platform.py", "test_reward_service.py", "training/"))


class Shared(LoadScopeScheduling):  # --dist loadgroup would do, but not with pytest 9.2 (pytest-xdist issue 1386)
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "with Ray" if file.startswith(_WITH_RAY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Shared:
    return Shared(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_WITH_RAY))  # the longest part starts first
