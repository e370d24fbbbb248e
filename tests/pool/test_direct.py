"""A plain SELECT reaches asyncpg itself, and nobody can tell but by the time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, Engine, Select, bindparam, event, exc, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from support import Item, recorded, tables

from overdrive import create_engine
from overdrive.context import collecting
from overdrive.errors import SessionEndedError
from overdrive.instrumentation.events import StatementEvent
from overdrive.pool import direct
from overdrive.pool.observe import observe
from overdrive.pool.session import AsyncWork, Sessions, send

pytestmark = pytest.mark.anyio

NAMES = select(Item.name).order_by(Item.id)


@pytest.fixture
def database(postgres_url: str) -> Any:
    with tables(postgres_url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
        yield database


@pytest.fixture
async def engine(postgres_url: str, database: Engine) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(postgres_url, pool_size=1, max_overflow=1, pool_timeout=1)
    observe(engine.sync_engine, "default")
    yield engine
    await engine.dispose()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The statements that were handed to the driver."""
    statements: list[Any] = []
    send = direct.send

    async def noted(engine: Engine, statement: Any, parameters: Any) -> Any:
        statements.append(statement.sql)
        return await send(engine, statement, parameters)

    monkeypatch.setattr(direct, "send", noted)
    return statements


def checked_out(engine: AsyncEngine) -> int:
    pool: Any = engine.sync_engine.pool
    return int(pool.checkedout())


async def names(session: AsyncSession, statement: Select[Any] = NAMES, **values: Any) -> list[str]:
    return [name for (name,) in await send(session, statement, values, columns=True)]


async def warm(engine: AsyncEngine) -> None:
    """Have the engine learn of its server what it asks over its first connection."""
    async with engine.connect():
        pass


async def test_the_database_is_asked_what_names_stand_for(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    observe(engine.sync_engine, "default").naming.forget()
    async with Sessions.of(engine)() as session:
        with collecting() as reads:
            assert await names(session) == ["a", "b"]
    assert (len(sent), reads.unknown) == (1, [])


async def test_the_session_never_has_the_connection(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        with recorded() as events, collecting() as reads:
            assert await names(session) == ["a", "b"]
        assert not session.in_transaction()
        assert checked_out(engine) == 0
    assert len(sent) == 1
    [seen] = [each for each in events if isinstance(each, StatementEvent)]
    assert (seen.sql, seen.rows, seen.transactional) == (sent[0], 2, False)
    assert reads.tags == {"default/items", "default/*"}


async def test_an_engine_that_has_not_met_its_server_asks_sqlalchemy(engine: AsyncEngine, sent: list[str]) -> None:
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
    assert not sent


async def test_values_go_where_they_belong(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    stmt = NAMES.where(Item.name != bindparam("unwanted"), Item.id > 0).limit(1).offset(0)
    async with Sessions.of(engine)() as session:
        assert await names(session, stmt, unwanted="a") == ["b"]
        assert await names(session, stmt, unwanted="b") == ["a"]
    assert len(sent) == 2


async def test_a_list_of_values_is_sent_as_sqlalchemy_expands_it(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        assert await names(session, NAMES.where(Item.id.in_([2, 3]))) == ["b"]
    assert not sent


async def test_a_transaction_goes_on(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        await session.execute(update(Item).values(name="mine"))
        assert await names(session) == ["mine", "mine"]
        await session.rollback()
    assert not sent


@contextmanager
def listening(target: Any, name: str) -> Any:
    heard: list[str] = []

    def listen(*_args: Any) -> None:
        heard.append(name)

    event.listen(target, name, listen)
    yield heard
    event.remove(target, name, listen)


@pytest.mark.parametrize(
    "name",
    [
        "engine_connect",
        "begin",
        "rollback",
        "before_execute",
        "after_execute",
        "before_cursor_execute",
        "after_cursor_execute",
        "do_execute",
    ],
)
async def test_whoever_listens_to_the_engine_hears_of_it(engine: AsyncEngine, sent: list[str], name: str) -> None:
    await warm(engine)
    with listening(engine.sync_engine, name) as heard:
        async with Sessions.of(engine)() as session:
            assert await names(session) == ["a", "b"]
            await session.rollback()
    assert heard
    assert not sent


@pytest.mark.parametrize(
    "name",
    ["after_begin", "after_transaction_create", "after_transaction_end", "after_soft_rollback", "after_rollback"],
)
async def test_whoever_listens_to_the_session_hears_of_it(engine: AsyncEngine, sent: list[str], name: str) -> None:
    await warm(engine)
    made = Sessions.of(engine)
    async with made() as session:
        with listening(type(session.sync_session), name) as heard:
            assert await names(session) == ["a", "b"]
            await session.rollback()
    assert heard
    assert not sent


async def test_other_isolation_has_its_transaction(postgres_url: str, database: Engine, sent: list[str]) -> None:
    engine = create_engine(postgres_url, isolation_level="REPEATABLE READ")
    observe(engine.sync_engine, "default")
    await warm(engine)
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
        assert session.in_transaction()
    assert not sent
    await engine.dispose()


async def test_an_engine_that_echoes_says_what_it_sends(
    engine: AsyncEngine, sent: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    await warm(engine)
    caplog.set_level("INFO", "sqlalchemy.engine")
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
    assert not sent
    assert "FROM items" in caplog.text


async def test_a_session_inside_a_tests_connection_stays_there(engine: AsyncEngine, sent: list[str]) -> None:
    made = Sessions.of(engine)
    async with engine.connect() as connection:
        await connection.execute(update(Item).values(name="kept inside"))
        with made.bound_to(connection):
            async with made() as session:
                assert await names(session) == ["kept inside"] * 2
    assert not sent


async def test_a_statement_that_changes_something_has_its_transaction(engine: AsyncEngine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        await send(session, select(Item.name, func.set_config("a.b", "c", True)), {}, columns=True)
        assert session.in_transaction()
    assert not sent


async def test_a_session_that_has_ended_says_so(engine: AsyncEngine) -> None:
    await warm(engine)
    work = AsyncWork(Sessions.of(engine).open())
    assert work.settle(200)
    with pytest.raises(SessionEndedError):
        await names(work.session)


async def test_a_session_without_autobegin_says_so(engine: AsyncEngine) -> None:
    await warm(engine)
    async with async_sessionmaker(engine, autobegin=False)() as session:
        with pytest.raises(exc.InvalidRequestError, match="utobegin"):
            await names(session)


# Errors


async def test_an_error_of_the_database_is_sqlalchemys(engine: AsyncEngine, database: Engine, sent: list[str]) -> None:
    await warm(engine)
    with database.begin() as connection:
        connection.execute(text("DROP TABLE items CASCADE"))
    async with Sessions.of(engine)() as session:
        with pytest.raises(exc.ProgrammingError, match="items") as direct_error:
            await names(session)
        assert checked_out(engine) == 0
        with pytest.raises(exc.ProgrammingError) as usual_error:
            await session.execute(NAMES)
    assert len(sent) == 1
    for one, other in [(direct_error.value, usual_error.value)]:
        assert (one.statement, one.params, type(one.orig)) == (other.statement, other.params, type(other.orig))


async def test_a_changed_table_is_read_anew(engine: AsyncEngine, database: Engine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
        with database.begin() as connection:
            connection.execute(text("ALTER TABLE items ALTER COLUMN name TYPE varchar(77)"))
        assert await names(session) == ["a", "b"]
    assert len(sent) == 2


async def test_a_dead_connection_is_replaced(engine: AsyncEngine, database: Engine, sent: list[str]) -> None:
    await warm(engine)
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
        with database.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid != pg_backend_pid()"
                )
            )
        with pytest.raises(exc.DBAPIError) as error:
            await names(session)
        assert error.value.connection_invalidated
        assert await names(session) == ["a", "b"]
    assert len(sent) == 3
    assert checked_out(engine) == 0


async def test_no_connection_to_be_had(engine: AsyncEngine) -> None:
    await warm(engine)
    async with engine.connect(), engine.connect(), Sessions.of(engine)() as session:
        with pytest.raises(exc.TimeoutError):
            await names(session)


async def test_a_connection_beyond_the_size_of_a_queue_pool_is_closed(
    postgres_url: str, database: Engine, sent: list[str]
) -> None:
    engine = create_engine(postgres_url, pool_size=1, max_overflow=1, poolclass=AsyncAdaptedQueuePool)
    observe(engine.sync_engine, "default")
    async with engine.connect(), Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]
    assert len(sent) == 1
    assert engine.sync_engine.pool.overflow() == 0  # type: ignore[attr-defined]
    await engine.dispose()


async def test_a_cancelled_read_leaves_nothing_behind(engine: AsyncEngine, database: Engine, sent: list[str]) -> None:
    await warm(engine)
    with database.connect() as locking:
        locking.execute(text("LOCK TABLE items IN ACCESS EXCLUSIVE MODE"))
        async with Sessions.of(engine)() as session:
            reading = asyncio.create_task(names(session))
            await asyncio.sleep(0.1)
            assert checked_out(engine) == 1
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert checked_out(engine) == 0
    assert len(sent) == 1
    async with Sessions.of(engine)() as session:
        assert await names(session) == ["a", "b"]


async def test_a_statement_that_is_gone_is_not_kept(engine: AsyncEngine) -> None:
    await warm(engine)
    stmt = NAMES.where(Item.id > 0)
    async with Sessions.of(engine)() as session:
        assert await names(session, stmt) == ["a", "b"]
    gone = weakref.ref(stmt)
    del stmt
    gc.collect()
    assert gone() is None


async def test_a_statement_is_prepared_once(engine: AsyncEngine) -> None:
    await warm(engine)
    assert direct.of(engine.sync_engine, NAMES) is direct.of(engine.sync_engine, NAMES) is not None
