"""Shared by the fault tests."""

from __future__ import annotations

from typing import Any

import pytest

from dualblade.io import open_engine
from dualblade.testing import FaultyEngine


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> list[FaultyEngine]:
    """Engines that caches open from now on are faulty ones, to be found in this list."""
    opened: list[FaultyEngine] = []

    def open_faulty(*args: Any, **options: Any) -> FaultyEngine:
        opened.append(FaultyEngine(open_engine(*args, **options)))
        return opened[-1]

    monkeypatch.setattr("dualblade.hf.opening.open_engine", open_faulty)
    return opened
