"""Who gets whose response, for as long as there is time. A round is 500 stories."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache.identities import search


@pytest.mark.parametrize("stored", ["memory", "redis"])
def test_identities(request: pytest.FixtureRequest, sqlite_url: str, stored: str, rounds: Iterator[int]) -> None:
    redis_url = request.getfixturevalue("redis_url") if stored == "redis" else None
    for _ in rounds:
        search(sqlite_url, redis_url, 500)
