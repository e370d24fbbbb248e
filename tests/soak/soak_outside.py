"""Leaders that are killed or stand still while others write, for as long as there is time."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from sqlalchemy import insert
from support import Item, tables
from test_outside import install, takes_over

pytestmark = pytest.mark.anyio


async def test_leaders_come_and_go(postgres_database: str, redis_url: str, rounds: Iterator[int]) -> None:
    for number in rounds:
        with tables(postgres_database) as engine, engine.begin() as connection:
            connection.execute(insert(Item).values([{"name": "first"}, {"name": "second"}]))
        install(postgres_database)
        await takes_over(postgres_database, redis_url, (signal.SIGSTOP, signal.SIGKILL)[number % 2])
