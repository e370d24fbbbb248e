"""A request that executes one statement too often is told so, with the place in its own code."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select, text
from support import Item, call, tables

from overdrive import Overdrive, SessionDep, SessionFactoryDep, Settings, SyncSessionDep, stream
from overdrive.errors import ConfigurationError
from overdrive.instrumentation.repeats import Repeats

pytestmark = pytest.mark.anyio


async def load_item(db: Any, number: int) -> Any:
    return (await db.execute(select(Item).where(Item.id == number).with_for_update())).scalars().all()


async def read_item(db: Any, number: int) -> Any:
    return (await db.execute(select(Item).where(Item.id == number))).scalars().all()


@asynccontextmanager
async def served(url: str, **log: Any) -> AsyncIterator[FastAPI]:
    app = FastAPI()
    overdrive = Overdrive(app, settings=Settings(database_url=url, log=log))  # type: ignore[arg-type]

    @app.get("/items/{count}")
    async def items(count: int, db: SessionDep) -> int:
        for number in range(count):
            await load_item(db, number)
        return count

    @app.get("/read/{count}")
    async def read(count: int, db: SessionDep) -> int:
        for number in range(count):
            await read_item(db, number)
        return count

    @app.get("/plain/{count}")
    def plain(count: int, db: SyncSessionDep) -> int:
        for number in range(count):
            db.execute(text("SELECT 1"))
            db.execute(text("SELECT :n, 'it''s 5', 17"), {"n": number})
            db.execute(text("SELECT 17, :n"), {"n": number})
            db.execute(text("SELECT 17, :n"), {"n": number})
        return count

    @app.get("/filled/{count}")
    async def filled(count: int, db: SessionDep) -> None:
        await db.execute(insert(Item), [{"id": number, "name": "x"} for number in range(count)])

    @app.get("/stream")
    async def everything(sessions: SessionFactoryDep) -> Any:
        return stream(overdrive.sessions(), select(Item))

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, sessions: SessionFactoryDep) -> None:
        await websocket.accept()
        for number in range(30):
            async with sessions() as db:
                await load_item(db, number)
        await websocket.close()

    with tables(url):
        yield app
    await overdrive.aclose()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "executed one statement" in record.getMessage()]


def line_of(function: Any, code: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if code in line)


@pytest.mark.parametrize(("path", "function"), [("/items", load_item), ("/read", read_item)])
async def test_the_place_of_a_repeated_statement_is_named(
    url: str, path: str, function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(url) as app:
        await call(app, f"{path}/20")
        assert warnings(caplog) == []
        await call(app, f"{path}/21")
        [warning] = warnings(caplog)
    assert warning.startswith(f"GET {path}/{{count}} executed one statement 21 times, at {__file__}:")
    assert f":{line_of(function, 'await db')} in {function.__name__}:" in warning
    assert re.search(r"SELECT items\.id, items\.name, .* FROM items WHERE items\.id = [$%:?(]", warning)


async def test_in_plain_functions_too_and_without_values(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(url, repeated_statements=3) as app:
        await call(app, "/plain/4")
    [warning] = warnings(caplog)
    assert "executed one statement 8 times" in warning
    assert " in plain, and 2 others too often: " in warning
    assert "17" not in warning.rsplit("SELECT", 1)[1]


async def test_nobody_is_told_who_does_not_ask(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(sqlite_url, repeated_statements=None) as app:
        await call(app, "/items/30")
    assert warnings(caplog) == []


async def test_rows_sent_in_batches_are_no_fault_of_the_team(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(url, repeated_statements=1) as app:
        await call(app, "/filled/2500")
        answer = await call(app, "/stream")
    assert answer.body.count(b"\n") >= 2500
    assert warnings(caplog) == []


async def test_a_socket_may_repeat_itself(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(sqlite_url) as app:
        sent: list[str] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        scope = {"type": "websocket", "path": "/socket", "query_string": b"", "headers": [], "subprotocols": []}
        await app(scope, receive, send)
    assert sent == ["websocket.accept", "websocket.close"]
    assert warnings(caplog) == []


def test_a_variable_says_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVE_LOG__REPEATED_STATEMENTS", "off")
    assert Settings.load().log.repeated_statements is None
    monkeypatch.setenv("OVERDRIVE_LOG__REPEATED_STATEMENTS", "0")
    with pytest.raises(ConfigurationError, match="OVERDRIVE_LOG__REPEATED_STATEMENTS"):
        Settings.load()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_the_most_frequent_is_named(statements: list[str], limit: int) -> None:
    repeats = Repeats(limit)
    for sql in statements:
        if repeats.add(sql):
            repeats.came_from(sql, ("file", 1, sql))
    often = {sql: statements.count(sql) for sql in statements if statements.count(sql) > limit}
    worst = repeats.worst()
    if worst is None:
        assert not often
    else:
        assert (worst.count, worst.others) == (max(often.values()), len(often) - 1)
        assert often[worst.sql] == worst.count


def test_what_is_kept_of_a_request_is_bounded() -> None:
    repeats = Repeats(1)
    crossed = [repeats.add(f"SELECT {number}") or repeats.add(f"SELECT {number}") for number in range(1500)]
    assert sum(crossed) == 1000
