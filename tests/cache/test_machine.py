"""Whatever happens in between: what a worker answers after a write was answered is what the database would say."""

from __future__ import annotations

import pytest
from cache.machine import run, workers


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a request that stands still goes ahead soon, and Redis is soon asked again."""
    monkeypatch.setattr("overdrive.cache.flight._PATIENCE", 0.02)
    monkeypatch.setattr("overdrive.cache.link.FIRST_PAUSE", 0.001)


def test_nothing_stale_is_answered(postgres_url: str, redis_url: str) -> None:
    with workers(postgres_url, redis_url) as machine:
        run(machine, examples=10)
