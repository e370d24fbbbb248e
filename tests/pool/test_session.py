"""A session that has only read ends where it stands, without a task, a greenlet or a word to the database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, event, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from support import Item, Other, tables

from overdrive import create_engine
from overdrive.errors import SessionEndedError
from overdrive.pool.observe import observe
from overdrive.pool.session import AsyncWork, Sessions, adds_nothing, send

pytestmark = pytest.mark.anyio

Use = Callable[[AsyncSession], Awaitable[Any]]


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url, pool_size=1, max_overflow=1)
    observe(engine.sync_engine, "default")
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
        yield engine
        await engine.dispose()


async def read(session: AsyncSession) -> None:
    await session.scalars(select(Item))


async def nothing(_session: AsyncSession) -> None: ...


async def add(session: AsyncSession) -> None:
    session.add(Item(name="c"))


async def flush(session: AsyncSession) -> None:
    await add(session)
    await session.flush()


async def change(session: AsyncSession) -> None:
    item = (await session.scalars(select(Item).limit(1))).one()
    item.name = "changed"


async def delete(session: AsyncSession) -> None:
    await session.delete((await session.scalars(select(Item).limit(1))).one())


async def say(session: AsyncSession) -> None:
    await session.execute(text("UPDATE items SET name = 'said'"))


async def lock(session: AsyncSession) -> None:
    await session.scalars(select(Item).with_for_update())


async def use_driver(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql("INSERT INTO items (name) VALUES ('driven')")


@pytest.mark.parametrize("use", [read, nothing])
async def test_reading_is_settled_at_once(engine: AsyncEngine, use: Use) -> None:
    work = AsyncWork(Sessions.of(engine).open())
    await use(work.session)
    waits = "psycopg" in engine.dialect.driver and use is read
    assert work.settle(200) is not waits
    if waits:
        await work.end(200)
    assert engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert not work.settle(200)
    with pytest.raises(SessionEndedError):
        await read(work.session)


@pytest.mark.parametrize("use", [add, flush, change, delete, say, use_driver])
async def test_writing_is_not(engine: AsyncEngine, use: Use) -> None:
    work = AsyncWork(Sessions.of(engine).open())
    await use(work.session)
    assert not work.settle(200)
    await work.end(200)
    async with Sessions.of(engine)() as session:
        names = (await session.scalars(select(Item.name).order_by(Item.id))).all()
    assert names != ["a", "b"]


async def test_a_lock_is_not(url: str, engine: AsyncEngine) -> None:
    work = AsyncWork(Sessions.of(engine).open())
    await lock(work.session)
    # SQLite has no such lock, and there it is a read.
    assert work.settle(200) is ("sqlite" in url)
    await work.abandon()


async def test_what_a_team_runs_at_commit_runs(engine: AsyncEngine) -> None:
    ran: list[str] = []

    class Listened(AsyncSession):
        sync_session_class = type("Session", (AsyncSession.sync_session_class,), {})

    event.listen(Listened.sync_session_class, "before_commit", lambda _session: ran.append("before"))
    work = AsyncWork(Sessions.of(engine, Listened).open())
    await read(work.session)
    assert not work.settle(200)
    await work.end(200)
    assert ran == ["before"]


async def test_a_connection_beyond_the_size_of_a_queue_pool_is_closed_with_time_for_it(url: str) -> None:
    engine = create_engine(url, pool_size=1, max_overflow=1, poolclass=AsyncAdaptedQueuePool)
    observe(engine.sync_engine, "default")
    with tables(url):
        first, second = (AsyncWork(Sessions.of(engine).open()) for _ in range(2))
        await read(first.session)
        await read(second.session)
        for work in (first, second):
            assert not work.settle(200)
            await work.end(200)
        assert engine.sync_engine.pool.overflow() == 0  # type: ignore[attr-defined]
        await engine.dispose()


# Columns fetched past the session's own loading


@pytest.mark.parametrize(
    ("use", "plain"), [(nothing, True), (read, False), (add, False), (change, False), (delete, False)]
)
async def test_a_session_with_something_of_the_class_adds_something(engine: AsyncEngine, use: Use, plain: bool) -> None:
    async with async_sessionmaker(engine)() as session:
        kept = (await session.scalars(select(Item))).all() if use is read else None
        await use(session)
        assert adds_nothing(session.sync_session, Item) is plain
        assert adds_nothing(session.sync_session, Other) is (plain or use is read)
        del kept


async def test_a_session_of_a_team_that_takes_part_adds_something(engine: AsyncEngine) -> None:
    base = AsyncSession.sync_session_class
    bound = type("Bound", (base,), {"get_bind": lambda self, *_args, **_kwargs: engine.sync_engine})
    executing = type(
        "Executing", (base,), {"execute": lambda self, *args, **kwargs: base.execute(self, *args, **kwargs)}
    )
    listened = type("Listened", (base,), {})
    event.listen(listened, "do_orm_execute", lambda _state: None)
    for session_class, plain in [(base, True), (bound, False), (executing, False), (listened, False)]:
        async with AsyncSession(engine, sync_session_class=session_class) as session:
            assert adds_nothing(session.sync_session, Item) is plain


async def test_columns_are_fetched_on_the_sessions_own_connection(engine: AsyncEngine) -> None:
    async with async_sessionmaker(engine)() as session:
        await session.execute(insert(Item), [{"name": "uncommitted"}])
        result = await send(session, select(Item.name).order_by(Item.id), {}, columns=True)
        assert result.scalars().all() == ["a", "b", "uncommitted"]
