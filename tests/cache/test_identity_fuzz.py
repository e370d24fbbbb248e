"""Identities, tenants and routes, made up at random. Promise 2, over apps beside themselves without a cache."""

from __future__ import annotations

import pytest
from cache.identities import search


@pytest.mark.parametrize(("stored", "stories"), [("memory", 120), ("redis", 30)])
def test_nobody_gets_anothers_response(
    request: pytest.FixtureRequest, sqlite_url: str, stored: str, stories: int
) -> None:
    redis_url = request.getfixturevalue("redis_url") if stored == "redis" else None
    tally = search(sqlite_url, redis_url, stories)
    assert min(vars(tally).values()) > 0, tally
