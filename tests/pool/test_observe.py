"""Statements and commits as events, in every form: greenlet, thread, autocommit, savepoint, cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection, Engine, delete, event, func, insert, make_url, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from support import Item, Other, eventually, names, recorded, tables

from overdrive import ConfigurationError, create_engine
from overdrive.context import collecting
from overdrive.instrumentation.events import StatementEvent
from overdrive.pool.engine import create_sync_engine
from overdrive.pool.observe import Observation, Outcome, observe
from overdrive.pool.session import Sessions

pytestmark = pytest.mark.anyio

ITEMS = "main/items"


class Recorder:
    """A commit observer that writes down what it is told, and can be held up."""

    def __init__(self) -> None:
        self.told: list[tuple[frozenset[str], Outcome | None]] = []
        self.gate: asyncio.Event | None = None
        self.refuses = False

    async def before(self, writes: frozenset[str], sql: str) -> frozenset[str]:
        self.told.append((writes, None))
        if self.refuses:
            raise PermissionError("not now")
        return writes

    async def after(self, token: frozenset[str], outcome: Outcome) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.told.append((token, outcome))

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for _, outcome in self.told if outcome is not None]


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        yield engine


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def engine(url: str, database: Engine, recorder: Recorder) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url, pool_size=2, max_overflow=0)
    observe(engine.sync_engine, "main", recorder)
    yield engine
    await engine.dispose()


@pytest.fixture
def synchronous(url: str, database: Engine, recorder: Recorder) -> Iterator[Observation]:
    engine = create_sync_engine(url)
    yield observe(engine, "main", recorder)
    engine.dispose()


# Writes


def orm_insert(session: Any) -> Any:
    session.add(Item(name="new"))


WRITES = {
    "unit of work": orm_insert,
    "core insert": lambda s: s.execute(insert(Item).values(name="new")),
    "bulk update": lambda s: s.execute(update(Item).values(name="new")),
    "core delete": lambda s: s.execute(delete(Item.__table__)),
    "executemany": lambda s: s.execute(insert(Item), [{"name": "new"}, {"name": "newer"}]),
    "insert in a cte": lambda s: s.execute(
        select(insert(Item).values(name="new").returning(Item.id).cte("added").c.id)
    ),
}


@pytest.mark.parametrize("write", WRITES)
async def test_commit_reports_the_tables_written(engine: AsyncEngine, recorder: Recorder, url: str, write: str) -> None:
    if write == "insert in a cte" and "sqlite" in url:
        return  # SQLite has no such statement
    async with AsyncSession(engine) as session:
        result = WRITES[write](session)
        if asyncio.iscoroutine(result):
            await result
        await session.commit()
    written = {ITEMS, f"{ITEMS}#"} if write in ("bulk update", "core delete") else {ITEMS}
    assert recorder.told == [(written, None), (written, Outcome.COMMITTED)]


@pytest.mark.parametrize("write", ["unit of work", "bulk update"])
async def test_rollback_reports_nothing(engine: AsyncEngine, recorder: Recorder, write: str) -> None:
    async with AsyncSession(engine) as session:
        result = WRITES[write](session)
        if asyncio.iscoroutine(result):
            await result
        await session.flush()
        await session.rollback()
        await session.execute(select(Item))
        await session.commit()
    assert recorder.told == []


async def test_textual_sql_writes_everything_unless_it_reads(engine: AsyncEngine, recorder: Recorder) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
    assert recorder.told == []
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE items SET name = 'x'"))
        await connection.exec_driver_sql("DELETE FROM others")
    assert recorder.told == [({"main/*"}, None), ({"main/*"}, Outcome.COMMITTED)]


async def test_savepoint_released_is_reported_and_again_with_the_commit(
    engine: AsyncEngine, recorder: Recorder
) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            session.add(Item(name="inner"))
        assert recorder.outcomes == [Outcome.COMMITTED]
        await session.commit()
    assert recorder.outcomes == [Outcome.COMMITTED, Outcome.COMMITTED]


async def test_savepoint_is_undone_with_the_transaction_around_it(engine: AsyncEngine, database: Engine) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            session.add(Item(name="inner"))
        await session.rollback()
    assert names(database) == []


def write_at_once(database: Engine) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 0")
        connection.execute(insert(Item).values(name="from outside"))


async def test_sqlite_reader_in_a_savepoint_may_become_a_writer(sqlite_url: str) -> None:
    with tables(sqlite_url) as database:
        engine = create_engine(sqlite_url)
        async with AsyncSession(engine) as session:
            nested = await session.begin_nested()
            await session.execute(select(Item))
            with pytest.raises(OperationalError, match="locked"):
                write_at_once(database)
            session.add(Item(name="inner"))
            await nested.commit()
            await session.commit()
        assert names(database) == ["inner"]
        await engine.dispose()


async def test_write_in_a_rolled_back_savepoint_may_be_reported_but_is_never_missed(
    engine: AsyncEngine, recorder: Recorder
) -> None:
    async with AsyncSession(engine) as session:
        session.add(Other(name="outer"))
        await session.flush()
        nested = await session.begin_nested()
        session.add(Item(name="inner"))
        await session.flush()
        await nested.rollback()
        await session.commit()
    writes, outcome = recorder.told[-1]
    assert outcome is Outcome.COMMITTED
    assert "main/others" in writes


async def test_savepoint_under_a_foreign_transaction_that_never_commits(
    engine: AsyncEngine, recorder: Recorder
) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Item(name="x"))
            await session.commit()
        assert recorder.told[-1] == ({ITEMS}, Outcome.COMMITTED)
        await outer.rollback()


async def test_autocommit_reports_each_statement(engine: AsyncEngine, recorder: Recorder) -> None:
    async with engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(insert(Item).values(name="x"))
        assert recorder.told == [({ITEMS}, None), ({ITEMS}, Outcome.COMMITTED)]
        with pytest.raises(IntegrityError):
            await connection.execute(insert(Item).values(name=None))
    assert recorder.told[2:] == [({ITEMS}, None), ({ITEMS}, Outcome.UNKNOWN)]


async def test_a_commit_in_words_is_one(engine: AsyncEngine, recorder: Recorder) -> None:
    async with engine.connect() as connection:
        await connection.execute(insert(Item).values(name="x"))
        await connection.execute(text("COMMIT"))
        assert recorder.outcomes == [Outcome.COMMITTED]
        assert ITEMS in recorder.told[0][0]
        # Nothing is left to be undone, nor to be told.
        await connection.rollback()
    assert len(recorder.told) == 2


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_commit_in_two_phases(postgres_url: str, driver: str, recorder: Recorder) -> None:
    engine = create_engine(postgres_url.replace("asyncpg", driver))
    observe(engine.sync_engine, "main", recorder)

    def work(connection: Connection) -> None:
        with connection.begin_twophase():
            connection.execute(insert(Item).values(name="x"))

    with tables(postgres_url) as database:
        async with engine.connect() as connection:
            await connection.run_sync(work)
        assert names(database) == ["x"]
    assert recorder.told[0] == ({ITEMS}, None)
    assert recorder.told[-1] == ({ITEMS}, Outcome.COMMITTED)
    await engine.dispose()


async def test_refused_commit_is_reported_as_rolled_back(
    engine: AsyncEngine, database: Engine, recorder: Recorder
) -> None:
    async with AsyncSession(engine) as session:
        session.add(Item(name="orphan", parent_id=99))
        with pytest.raises(IntegrityError):
            await session.commit()
    assert recorder.outcomes == [Outcome.ROLLED_BACK]
    # The connection that is back in the pool is in no transaction: its next user starts afresh.
    async with AsyncSession(engine) as session:
        session.add(Item(name="next"))
        await session.commit()
    assert names(database) == ["next"]


async def test_observer_can_refuse_a_commit(engine: AsyncEngine, database: Engine, recorder: Recorder) -> None:
    recorder.refuses = True
    async with AsyncSession(engine) as session:
        session.add(Item(name="refused"))
        with pytest.raises(PermissionError):
            await session.commit()
    recorder.refuses = False
    async with AsyncSession(engine) as session:
        session.add(Item(name="next"))
        await session.commit()
    assert names(database) == ["next"]


@pytest.mark.parametrize("cancel", ["native", "anyio"])
async def test_after_is_called_when_commit_is_cancelled(engine: AsyncEngine, recorder: Recorder, cancel: str) -> None:
    dialect: Any = engine.sync_engine.dialect
    committing, commit = asyncio.Event(), dialect.do_commit

    async def linger() -> None:
        committing.set()
        await asyncio.sleep(30)

    @event.listens_for(engine.sync_engine, "commit")
    def hold_up(connection: Any) -> None:
        """Stand where the driver waits for the server's answer to COMMIT."""
        driver: Any = connection.connection.dbapi_connection
        original = type(driver).commit

        def slow(self: Any) -> None:
            original(self)
            from sqlalchemy.util import await_only

            await_only(linger())

        patch.setattr(type(driver), "commit", slow)

    async def work() -> None:
        async with AsyncSession(engine) as session:
            session.add(Item(name="x"))
            await session.commit()

    before = asyncio.all_tasks()
    assert commit is dialect.do_commit
    with pytest.MonkeyPatch.context() as patch:
        if cancel == "native":
            task = asyncio.create_task(work())
            await committing.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                await committing.wait()
                group.cancel_scope.cancel()
    await eventually(lambda: recorder.outcomes == [Outcome.UNKNOWN])
    pool: Any = engine.sync_engine.pool
    await eventually(lambda: pool.checkedout() == 0)
    await eventually(lambda: asyncio.all_tasks() <= before)
    # A thread of aiosqlite that is closing its file has its last answer still to hand to this loop.
    await eventually(lambda: not [thread for thread in threading.enumerate() if "_connection" in thread.name])


async def test_after_goes_on_when_its_caller_is_cancelled(engine: AsyncEngine, recorder: Recorder) -> None:
    recorder.gate = asyncio.Event()

    async def work() -> None:
        async with AsyncSession(engine) as session:
            session.add(Item(name="x"))
            await session.commit()

    task = asyncio.create_task(work())
    await eventually(lambda: len(recorder.told) == 1)
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    recorder.gate.set()
    await eventually(lambda: recorder.outcomes == [Outcome.COMMITTED])
    await eventually(lambda: not [thread for thread in threading.enumerate() if "_connection" in thread.name])


# Synchronous engines


async def test_commit_in_a_thread_is_reported_on_the_serving_loop(synchronous: Observation, recorder: Recorder) -> None:
    loops: list[Any] = []
    recorder.before = _spying(recorder.before, loops)  # type: ignore[method-assign]
    synchronous.loop = asyncio.get_running_loop()

    def work() -> None:
        with Session(synchronous.engine) as session:
            session.add(Item(name="x"))
            session.commit()

    await anyio.to_thread.run_sync(work)
    assert recorder.told == [({ITEMS}, None), ({ITEMS}, Outcome.COMMITTED)]
    assert loops == [asyncio.get_running_loop()]


def _spying(before: Any, loops: list[Any]) -> Any:
    async def spy(writes: frozenset[str], sql: str) -> Any:
        loops.append(asyncio.get_running_loop())
        return await before(writes, sql)

    return spy


def test_commit_in_a_script_is_reported_without_any_loop(synchronous: Observation, recorder: Recorder) -> None:
    with Session(synchronous.engine) as session:
        session.add(Item(name="x"))
        session.commit()
    assert recorder.told == [({ITEMS}, None), ({ITEMS}, Outcome.COMMITTED)]


async def test_commit_on_the_loops_own_thread_does_not_deadlock(synchronous: Observation, recorder: Recorder) -> None:
    synchronous.loop = asyncio.get_running_loop()
    with Session(synchronous.engine) as session:
        session.add(Item(name="x"))
        session.commit()
    assert recorder.outcomes == [Outcome.COMMITTED]


# Several who observe


async def test_everybody_is_told_with_his_own_token_and_statements_are_seen_once(
    engine: AsyncEngine, recorder: Recorder
) -> None:
    other = Recorder()
    assert observe(engine.sync_engine, "main", other) is observe(engine.sync_engine, "main")
    with recorded() as events:
        async with AsyncSession(engine) as session:
            session.add(Item(name="x"))
            await session.commit()
    assert other.told == recorder.told == [({ITEMS}, None), ({ITEMS}, Outcome.COMMITTED)]
    assert len(events) == 1
    other.refuses = True
    async with AsyncSession(engine) as session:
        session.add(Item(name="y"))
        with pytest.raises(PermissionError):
            await session.commit()
    assert recorder.outcomes == [Outcome.COMMITTED, Outcome.ROLLED_BACK]


async def test_one_who_fails_keeps_nobody_from_being_told(engine: AsyncEngine, recorder: Recorder) -> None:
    class Failing(Recorder):
        async def after(self, token: frozenset[str], outcome: Outcome) -> None:
            raise ZeroDivisionError

    observe(engine.sync_engine, "main").observers.insert(0, Failing())
    async with AsyncSession(engine) as session:
        session.add(Item(name="x"))
        with pytest.raises(ZeroDivisionError):
            await session.commit()
    assert recorder.outcomes == [Outcome.COMMITTED]


async def test_an_engine_has_one_name(engine: AsyncEngine) -> None:
    with pytest.raises(ConfigurationError, match="known as 'main' already"):
        observe(engine.sync_engine, "reports")


# Reads


async def test_reads_reach_every_open_collector(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        with collecting() as outer:
            await session.execute(select(Item.name))
            with collecting() as inner:
                await session.execute(select(Other).where(select(Item.id).exists()))
        await session.execute(select(func.count()).select_from(Other))
    assert inner.tags == {"main/items", "main/others", "main/*"}
    assert outer.tags == inner.tags
    assert inner.unknown == []


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (text("SELECT 1"), "textual SQL"),
        (select(func.now()), r"now\(\)"),
        (select(Item).where(text("1 = 1")), r"text\(\)"),
    ],
    ids=str,
)
async def test_what_cannot_be_described_is_said(engine: AsyncEngine, url: str, statement: Any, why: str) -> None:
    if "sqlite" in url and "now" in why:
        statement, why = select(func.random()), "random"
    with collecting() as reads:
        async with engine.connect() as connection:
            await connection.execute(statement)
    assert len(reads.unknown) == 1
    assert why.replace("\\", "") in reads.unknown[0]


async def test_statement_event(engine: AsyncEngine) -> None:
    with recorded() as events:
        async with AsyncSession(engine) as session:
            await session.execute(select(Item.id))
            await session.execute(insert(Other).values(name="x"))
            await session.commit()
    read, write = (event for event in events if isinstance(event, StatementEvent))
    assert (read.engine, read.reads, read.writes) == ("main", {"main/items", "main/*"}, frozenset())
    assert read.sql.startswith("SELECT")
    assert write.writes == {"main/others"}
    assert write.rows == 1
    assert write.transactional
    assert min(read.duration, write.duration) > 0


# Reads without a transaction


async def server_sees_transaction(session: AsyncSession) -> bool:
    """Whether the server has a transaction open for the session's connection while no statement runs."""
    raw: Any = (await (await session.connection()).get_raw_connection()).driver_connection
    if hasattr(raw, "is_in_transaction"):
        return bool(raw.is_in_transaction())
    if hasattr(raw, "in_transaction"):
        return bool(raw.in_transaction)
    return raw.info.transaction_status.name != "IDLE"


async def test_plain_reads_open_no_transaction(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(select(Item).where(Item.id == 1))
        await session.execute(select(func.count()).select_from(Item))
        assert not await server_sees_transaction(session)


@pytest.mark.parametrize(
    "statement",
    [
        select(Item).with_for_update(),
        select(func.version()),
        select(func.set_config("application_name", "x", True)),
        text("SET LOCAL statement_timeout = 1000"),
        insert(Item).values(name="x"),
    ],
    ids=["for update", "unknown function", "set_config", "set local", "insert"],
)
async def test_everything_else_does_on_postgresql(engine: AsyncEngine, url: str, statement: Any) -> None:
    if "sqlite" in url:
        statement = insert(Item).values(name="x")
    async with AsyncSession(engine) as session:
        await session.execute(select(Item))
        await session.execute(statement)
        assert await server_sees_transaction(session)
        await session.execute(select(Item))
        assert await server_sees_transaction(session)
        await session.rollback()
        await session.execute(select(Item))
        assert not await server_sees_transaction(session)


async def test_repeatable_read_keeps_its_snapshot(postgres_url: str) -> None:
    with tables(postgres_url) as database:
        engine = create_engine(postgres_url, isolation_level="REPEATABLE READ")
        observe(engine.sync_engine, "main")
        async with AsyncSession(engine) as session:
            assert (await session.scalars(select(Item.name))).all() == []
            with database.begin() as connection:
                connection.execute(insert(Item).values(name="later"))
            assert (await session.scalars(select(Item.name))).all() == []
            assert await server_sees_transaction(session)
        await engine.dispose()


async def test_per_connection_isolation_keeps_its_snapshot(postgres_url: str) -> None:
    with tables(postgres_url) as database:
        engine = create_engine(postgres_url)
        observe(engine.sync_engine, "main")
        async with AsyncSession(engine) as session:
            await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            assert (await session.scalars(select(Item.name))).all() == []
            with database.begin() as connection:
                connection.execute(insert(Item).values(name="later"))
            assert (await session.scalars(select(Item.name))).all() == []
        await engine.dispose()


async def test_streamed_read_has_the_transaction_its_cursor_needs(engine: AsyncEngine, database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(insert(Item), [{"name": str(n)} for n in range(50)])
    async with AsyncSession(engine) as session:
        stream = await session.stream_scalars(select(Item.id).order_by(Item.id).execution_options(yield_per=7))
        assert [row async for row in stream] == list(range(1, 51))


async def test_connection_goes_back_as_it_came(engine: AsyncEngine, url: str) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(select(Item))
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).dbapi_connection
        if "postgresql" in url:
            assert raw.autocommit is False


async def test_reading_then_writing_in_one_session_commits_once(
    engine: AsyncEngine, database: Engine, recorder: Recorder
) -> None:
    sessions = Sessions.of(engine)
    async with sessions() as session:
        assert await session.get(Item, 1) is None
        session.add(Item(id=1, name="a"))
    async with sessions() as session:
        item = await session.get_one(Item, 1)
        item.name = "b"
    assert names(database) == ["b"]
    assert recorder.outcomes == [Outcome.COMMITTED] * 2


def test_urls_are_for_one_database() -> None:
    url = make_url("postgresql://u:p@h/d")
    assert create_engine(url).url.drivername == "postgresql+asyncpg"
    assert create_sync_engine(url).url.drivername == "postgresql+psycopg"
    assert create_sync_engine("sqlite+aiosqlite:///f").url.drivername == "sqlite"
