from __future__ import annotations

import compiled
import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes for which targets there are tests to be run, so that only these are compiled, ahead of the tests."""
    for item in session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            compiled.wanted.add(item.callspec.params.get("target"))
