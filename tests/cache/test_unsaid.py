"""Writes that a statement does not say: a function's, a foreign key's of the database alone, a driver's own commit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cache.service import Service, serve
from cache.test_relations import MISS_AND_HIT, UNKNOWN, lists, named, run, works
from cache.test_relations import emptied as emptied
from cache.test_relations import on_asyncpg as on_asyncpg
from cache.test_relations import service as service
from fastapi import FastAPI
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table, event, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from support import Item, Other, client, eventually, tables

from overdrive import Overdrive, SessionDep, SyncSessionDep, cached, create_engine
from overdrive.pool import naming, observe

pytestmark = pytest.mark.anyio

# Functions

FUNCTIONS = """
CREATE FUNCTION adds() RETURNS text LANGUAGE sql AS $$INSERT INTO others (name) VALUES ('made') RETURNING name$$;
CREATE FUNCTION reads() RETURNS text LANGUAGE sql STABLE AS $$SELECT name FROM others LIMIT 1$$;
"""


@pytest.mark.parametrize(
    "call",
    [
        select(func.adds()),
        select(Item.id).where(func.ADDS() != ""),
        insert(Item).values(name=func.adds()),
        text("SELECT adds()"),
        text("SELECT 1 AS x WHERE public.Adds() <> ''"),
    ],
)
async def test_a_function_that_may_write_writes_everything(service: Service, call: Any) -> None:
    run(service, FUNCTIONS)
    lists(service, "/others", named("others"))
    assert await service.marks("/others", "/others") == MISS_AND_HIT
    await service.write(works(call))
    assert (await service.get("/others")).json() == ["other", "made"]


@pytest.mark.parametrize("call", [select(func.reads()), select(func.now()), text("SELECT reads(), now()")])
async def test_other_functions_write_nothing(service: Service, call: Any) -> None:
    run(service, FUNCTIONS)
    assert await service.marks("/names", "/names") == MISS_AND_HIT
    await service.write(works(call))
    assert await service.marks("/names") == ["hit"]


# Foreign keys of which no model knows

CHILDREN = """
CREATE TABLE children (id serial PRIMARY KEY, name text, item int REFERENCES items ON DELETE CASCADE);
CREATE TABLE toys (id serial PRIMARY KEY, name text, child int REFERENCES children ON DELETE SET NULL);
INSERT INTO children VALUES (1, 'child', 1), (2, 'orphan', NULL);
INSERT INTO toys VALUES (1, 'ball', 1);
"""


def one_toy(service: Service) -> None:
    toys = Table("toys", MetaData(), Column("id", Integer, primary_key=True), Column("child", Integer))

    @service.app.get("/toy/{number}")
    @cached
    async def toy(number: int, db: SessionDep) -> int | None:
        return await db.scalar(select(toys.c.child).where(toys.c.id == number))


@pytest.mark.parametrize("on", ["postgresql", "sqlite"])
async def test_what_goes_along_by_a_key_that_the_database_alone_knows(on: str, emptied: str, sqlite_url: str) -> None:
    async with serve(emptied if on == "postgresql" else sqlite_url) as service:
        sql = CHILDREN if on == "postgresql" else CHILDREN.replace("serial", "integer")
        for each in filter(str.strip, sql.split(";")):
            run(service, each)
        lists(service, "/children", named("children"))
        lists(service, "/others", named("others"))
        one_toy(service)
        paths = ["/children", "/toy/1"]
        assert await service.marks(*(path for path in paths for _ in range(2))) == 2 * MISS_AND_HIT
        # What the keys do not go by changes nothing along.
        await service.write(works(update(Item).where(Item.id == 1).values(name="new")))
        assert await service.marks(*paths) == ["hit", "hit"]
        await service.marks("/others")
        await service.write(works(Item.__table__.delete().where(Item.id == 1)))
        assert [(await service.get(path)).json() for path in paths] == [["orphan"], None]
        assert await service.marks("/others") == ["hit"]


async def test_a_key_between_tables_of_two_metadata(service: Service) -> None:
    parents = Table("parents", MetaData(), Column("id", Integer, primary_key=True))
    far = Table(
        "far",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("name", String),
        Column("parent", ForeignKey(parents.c.id, ondelete="CASCADE", onupdate="CASCADE")),
        schema="elsewhere",
    )
    run(service, "CREATE SCHEMA elsewhere")
    for table in (parents, far):
        table.create(service.database)
    run(service, "INSERT INTO parents VALUES (1); INSERT INTO elsewhere.far VALUES (1, 'far', 1)")
    lists(service, "/far", far)
    assert await service.marks("/far", "/far") == MISS_AND_HIT
    await service.write(works(update(parents).values(id=2)))
    assert await service.marks("/far", "/far") == MISS_AND_HIT
    await service.write(works(parents.delete()))
    assert (await service.get("/far")).json() == []


# Commits that SQLAlchemy does not know of


async def test_a_driver_that_commits_by_itself(url: str) -> None:
    if "sqlite" in url:
        engine = create_async_engine(url, connect_args={"isolation_level": None})
    else:
        engine = create_engine(url)
        event.listen(engine.sync_engine, "connect", lambda connection, _: setattr(connection, "autocommit", True))
    await commits_by_itself(url, engine)


@pytest.mark.parametrize("url", ["aiosqlite", "asyncpg", "psycopg"], indirect=True)
async def test_an_engine_in_autocommit(url: str) -> None:
    await commits_by_itself(url, create_async_engine(url, isolation_level="AUTOCOMMIT"))


async def commits_by_itself(url: str, engine: Any) -> None:
    with tables(url) as database:
        app = FastAPI()
        overdrive = Overdrive(app, engine=engine, cache=True)
        async with client(app) as http:
            service = Service(app, overdrive, http, database)
            lists(service, "/others", named("others"))

            @app.post("/write")
            async def write(db: SessionDep) -> None:
                await db.execute(insert(Other).values(name="new"))

            assert await service.marks("/others", "/others") == MISS_AND_HIT
            await http.post("/write")
            assert (await service.get("/others")).json() == ["new"]
        await overdrive.aclose()
        await engine.dispose()


async def test_what_is_prepared_on_one_connection_and_committed_on_another(service: Service) -> None:
    lists(service, "/others", named("others"))
    assert await service.marks("/others", "/others") == MISS_AND_HIT
    engine = service.overdrive.engine

    def prepare(connection: Any) -> None:
        transaction = connection.begin_twophase("of_ours")
        connection.execute(insert(Other).values(name="new"))
        transaction.prepare()

    async with engine.connect() as connection:
        await connection.run_sync(prepare)
        await connection.invalidate()
    await service.marks("/others", "/others")
    async with engine.connect() as connection:
        await connection.run_sync(lambda connection: connection.commit_prepared("of_ours", recover=True))
    assert (await service.get("/others")).json() == ["other", "new"]


# Other programs


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_LOOK", 0.05)
    monkeypatch.setattr(naming, "_TOLD", 0.0)


@pytest.mark.parametrize("on", ["asyncpg", "psycopg", "aiosqlite"])
async def test_what_another_makes_of_a_table_is_learned_soon(
    attentive: None, on: str, emptied: str, sqlite_url: str
) -> None:
    async with serve(sqlite_url if on == "aiosqlite" else emptied.replace("asyncpg", on)) as service:
        lists(service, "/others", named("others"))
        assert await service.marks("/others", "/others") == MISS_AND_HIT
        run(service, "ALTER TABLE others RENAME TO gone")
        run(service, "CREATE VIEW others AS SELECT id, name FROM items")
        # By what this process knows it is another table's.
        await service.write(works(insert(Item).values(name="new")))
        answer = None
        async with asyncio.timeout(5):
            while answer != ["first", "new"]:
                await asyncio.sleep(0.02)
                answer = (await service.get("/others")).json()
        await eventually(lambda: service.overdrive.engine.pool.checkedout() == 0)  # type: ignore[attr-defined]


async def test_what_has_not_changed_drops_nothing(attentive: None, service: Service) -> None:
    run(service, "CREATE VIEW seen AS SELECT id, name FROM items")
    lists(service, "/seen", named("seen"))
    assert await service.marks("/names", "/names", "/seen", "/seen") == 2 * MISS_AND_HIT
    observation = observe.observation_of(service.overdrive.engine.sync_engine)
    assert observation is not None
    told = observation.naming._told
    async with asyncio.timeout(5):
        while observation.naming._told is told:
            await service.write(works(select(1)))
            await asyncio.sleep(0.02)
    assert await service.marks("/names", "/seen") == ["hit", "hit"]


# What reaches the driver past everybody


async def test_a_copy_through_the_drivers_own_connection(service: Service) -> None:
    lists(service, "/others", named("others"))

    async def copy(db: AsyncSession) -> None:
        raw = await (await db.connection()).get_raw_connection()
        driver: Any = raw.driver_connection
        if hasattr(driver, "copy_records_to_table"):
            await driver.copy_records_to_table("others", records=[("copied",)], columns=["name"])
        else:
            async with driver.cursor() as cursor, cursor.copy("COPY others (name) FROM STDIN") as into:
                await into.write_row(("copied",))

    assert await service.marks("/others", "/others") == MISS_AND_HIT
    assert await service.write(copy) == 200
    assert (await service.get("/others")).json() == ["other", "copied"]


async def test_what_is_read_there_is_not_kept(on_asyncpg: Service) -> None:
    @on_asyncpg.app.get("/raw")
    @cached
    async def raw(db: SessionDep) -> list[str]:
        pooled = await (await db.connection()).get_raw_connection()
        driver: Any = pooled.driver_connection
        return [row["name"] for row in await driver.fetch("SELECT name FROM others")]

    for _ in range(2):
        answer = await on_asyncpg.get("/raw")
        assert (answer.json(), answer.headers["cache-status"]) == (["other"], UNKNOWN)


async def test_a_thread_that_does_not_know_which_request_it_is_for(service: Service) -> None:
    @service.app.get("/executed")
    @cached
    async def executed(db: SyncSessionDep) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: list(db.scalars(select(Other.name))))

    @service.app.post("/executed")
    async def execute(db: SyncSessionDep) -> None:
        await asyncio.get_running_loop().run_in_executor(None, lambda: db.execute(insert(Other).values(name="new")))

    assert await service.marks("/executed", "/executed") == MISS_AND_HIT
    assert (await service.http.post("/executed")).status_code == 200
    assert (await service.get("/executed")).json() == ["other", "new"]
