"""Damaged cursors for as long as there is time: a round is 20,000 of them to the decoder, and 1,000 to an app."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from urllib.parse import quote

import pytest
from pagination.cases import damaged
from pagination.service import served
from sqlalchemy import insert
from support import Item, call, client, tables

from overdrive.errors import InvalidCursorError
from overdrive.pagination.cursor import decode, encode

pytestmark = pytest.mark.anyio

SIGNED = encode([123456, "abc"], [int, str], backward=False, binding=b"route", key=b"old")


async def test_damaged_cursors(sqlite_url: str, rounds: Iterator[int]) -> None:
    with tables(sqlite_url) as engine:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"n{n % 5}"} for n in range(23)])
        app, overdrive = served(sqlite_url)
        async with client(app) as http:
            cursors = [
                (await http.get(f"/feed?{query}")).json()["next_cursor"]
                for query in ("size=2", "size=3&sort=z", "size=1&name=n1")
            ]
        for number in rounds:
            generator = random.Random(number)
            for made in islice(damaged(SIGNED, generator), 20_000):
                with pytest.raises(InvalidCursorError):
                    decode(made, [int, str], binding=b"route", keys=[b"new", b"old"])
            for made in islice(damaged(cursors[number % 3], generator), 1_000):
                answer = await call(app, f"/feed?size=2&cursor={quote(made)}")
                assert answer.error is None
                assert (answer.status, b'"invalid_cursor"' in answer.body) == (400, True), made
        await overdrive.aclose()
