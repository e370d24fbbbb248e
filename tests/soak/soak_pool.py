"""Storms of cancellations, for as long as there is time. A round is 10,000 of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool.storm import storm

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_there_are_never_more_backends_than_places(
    postgres_database: str, driver: str, rounds: Iterator[int]
) -> None:
    for _ in rounds:
        await storm(postgres_database.replace("asyncpg", driver), 10_000)
