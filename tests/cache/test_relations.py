"""What only looks like a table: views, partitions, temporary tables, tables with row-level security."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from cache.service import Service, serve
from sqlalchemy import (
    URL,
    Column,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    event,
    insert,
    literal,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from support import Item, Other, outside

from overdrive import Page, SessionDep, SyncSessionDep, cached, paginate
from overdrive.context import collecting
from overdrive.pool import catalogue, naming, observe

pytestmark = pytest.mark.anyio

MISS_AND_HIT = ["miss", "hit"]
UNKNOWN = "overdrive; fwd=uri-miss; detail=unknown-reads"

DAYS = """
CREATE TABLE days (id int, day int, name text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (day);
CREATE TABLE days_11 PARTITION OF days_1 FOR VALUES FROM (0) TO (50);
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM (100) TO (200);
INSERT INTO days VALUES (1, 10, 'a'), (2, 110, 'b');
"""


def named(name: str, schema: str | None = None, **options: Any) -> Table:
    return Table(
        name, MetaData(), Column("id", Integer, primary_key=True), Column("name", String), schema=schema, **options
    )


def days(name: str) -> Table:
    return Table(
        name, MetaData(), *(Column(key, Integer, primary_key=True) for key in ("id", "day")), Column("name", String)
    )


def run(service: Service, sql: str) -> None:
    """Do what another program does."""
    with service.database.begin() as connection:
        connection.exec_driver_sql(sql)


def lists(service: Service, path: str, table: Table, **options: Any) -> None:
    @service.app.get(path)
    @cached(**options)
    async def listed(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(table.c.name).order_by(table.c.id)))


def works(statement: Any) -> Any:
    async def work(db: AsyncSession) -> None:
        await db.execute(statement)

    return work


@pytest.fixture
def emptied(postgres_url: str) -> Iterator[str]:
    """The database of the run, with nothing in it before and after."""
    engine = outside(postgres_url)

    def empty() -> None:
        with engine.begin() as connection:
            schemas = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
            for schema in connection.exec_driver_sql(schemas).scalars().all():
                connection.exec_driver_sql(f'DROP SCHEMA "{schema}" CASCADE')
            connection.exec_driver_sql("CREATE SCHEMA public")
            connection.exec_driver_sql("DROP FOREIGN DATA WRAPPER IF EXISTS w CASCADE")

    empty()
    yield postgres_url
    empty()
    engine.dispose()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def service(request: pytest.FixtureRequest, emptied: str) -> AsyncIterator[Service]:
    async with serve(emptied.replace("asyncpg", request.param)) as running:
        yield running


@pytest.fixture
async def on_asyncpg(emptied: str) -> AsyncIterator[Service]:
    async with serve(emptied) as running:
        yield running


@pytest.fixture
async def on_sqlite(sqlite_url: str) -> AsyncIterator[Service]:
    async with serve(sqlite_url) as running:
        yield running


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the database was asked for, each time."""
    times: list[Any] = []

    def counted(connection: Any, dialect: str, wanted: Any) -> Any:
        times.append(wanted)
        return catalogue.relations_of(connection, dialect, wanted)

    monkeypatch.setattr(naming, "relations_of", counted)
    return times


# Views


async def test_a_view_is_dropped_with_what_it_reads(service: Service) -> None:
    run(
        service,
        "CREATE VIEW plain AS SELECT i.id, upper(i.name) || count(o.id)::text AS name "
        "FROM items i, others o GROUP BY i.id;"
        "CREATE VIEW above AS SELECT id, name FROM plain WHERE id IN (SELECT id FROM items)",
    )
    lists(service, "/plain", named("plain"))
    lists(service, "/above", named("above", "public"))
    for work, name in ((insert(Other).values(name="x"), "FIRST2"), (update(Item).values(name="y"), "Y2")):
        assert await service.marks("/plain", "/plain", "/above", "/above") == 2 * MISS_AND_HIT
        await service.write(works(work))
        assert [(await service.get(path)).json() for path in ("/plain", "/above")] == [[name], [name]]
        await service.write(works(insert(Item).values(id=0, name="z")) if name == "FIRST2" else works(text("SELECT 1")))
        await service.write(works(Item.__table__.delete().where(Item.id == 0)))


DOUBTS = {
    "VIEW {} AS SELECT id, name FROM items WHERE now() > '2000-01-01'": "it calls now()",
    "VIEW {} AS SELECT id, random()::text AS name FROM items": "it calls random()",
    "VIEW {} AS SELECT id, name FROM items WHERE current_user <> ''": "SQLVALUEFUNCTION",
    "VIEW {} AS SELECT id, name FROM items WHERE 'now'::text::date > '2000-01-01'": "cast",
    "VIEW {} AS SELECT id, own(id) AS name FROM items": "it calls own()",
    "VIEW {} AS SELECT id, name FROM items TABLESAMPLE SYSTEM (100)": "TABLESAMPLECLAUSE",
    "VIEW {} AS SELECT oid::int AS id, relname AS name FROM pg_class": "not a table of this database's own",
    "MATERIALIZED VIEW {} AS SELECT id, name FROM items": "a materialized view",
    "VIEW {} AS SELECT id, name FROM kept": "a view of kept, which is a materialized view",
    "TABLE {} (id int, name text); ALTER TABLE {} ENABLE ROW LEVEL SECURITY": "row-level security",
    "VIEW {} AS SELECT id, name FROM secured": "a view of secured, which has row-level security",
}
BEFORE = """
CREATE FUNCTION own(int) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT name FROM others LIMIT 1';
CREATE MATERIALIZED VIEW kept AS SELECT id, name FROM items;
CREATE TABLE secured (id int, name text); ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
"""


async def test_what_cannot_be_known_is_not_kept_and_the_log_says_why(
    on_asyncpg: Service, caplog: pytest.LogCaptureFixture
) -> None:
    run(on_asyncpg, BEFORE)
    lists(on_asyncpg, "/declared", named("seen_1"), depends=["items"])
    for number, sql in enumerate(DOUBTS):
        run(on_asyncpg, "CREATE " + sql.replace("{}", f"seen_{number}"))
        lists(on_asyncpg, f"/seen_{number}", named(f"seen_{number}"))
    for number, why in enumerate(DOUBTS.values()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "overdrive"):
            for _ in range(2):
                assert (await on_asyncpg.get(f"/seen_{number}")).headers["cache-status"] == UNKNOWN
        (message,) = caplog.messages
        assert f"seen_{number} " in message
        assert why in message
    assert await on_asyncpg.marks("/declared", "/declared") == MISS_AND_HIT


async def test_nobody_hears_of_writes_to_a_foreign_table(on_asyncpg: Service) -> None:
    # Without a handler it can be made, but not read.
    run(on_asyncpg, "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w")
    run(on_asyncpg, "CREATE FOREIGN TABLE far (id int) SERVER s")
    with on_asyncpg.database.connect() as connection:
        known = catalogue.relations_of(connection.connection.dbapi_connection, "postgresql", ())
    assert "a foreign table" in (known.meaning("far").unknown or "")


@pytest.mark.parametrize(
    "what", ["VIEW seen AS SELECT id, name FROM items", "VIRTUAL TABLE seen USING fts5 (id, name)"]
)
async def test_sqlite_does_not_say_what_a_view_reads(
    on_sqlite: Service, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    run(on_sqlite, f"CREATE {what}")
    lists(on_sqlite, "/seen", named("SEEN"))
    assert (await on_sqlite.get("/seen")).headers["cache-status"] == UNKNOWN
    assert "SEEN is a v" in caplog.text


async def test_a_write_to_a_view_is_one_to_everything(on_asyncpg: Service) -> None:
    run(on_asyncpg, "CREATE VIEW seen AS SELECT id, name FROM items")
    assert await on_asyncpg.marks("/names", "/names") == MISS_AND_HIT
    await on_asyncpg.write(works(insert(named("seen")).values(id=7, name="seventh")))
    assert (await on_asyncpg.get()).json() == ["first", "seventh"]


# Partitions and heirs


async def test_partitions_are_parts_of_one_table(service: Service) -> None:
    run(service, DAYS)
    tables = {name: days(name) for name in ("days", "days_1", "days_11", "days_2")}
    for name, table in tables.items():
        lists(service, f"/{name}", table)

    @service.app.get("/days/{number}/{day}")
    @cached
    async def one(number: int, day: int, db: SessionDep) -> str | None:
        table = tables["days"]
        return await db.scalar(select(table.c.name).where(table.c.id == number, table.c.day == day))

    paths = ["/days", "/days_1", "/days_11", "/days/1/10"]
    for name, written in (("days", "c"), ("days_1", "d"), ("days_11", "e")):
        table = tables[name]
        assert await service.marks(*(path for path in paths for _ in range(2))) == 4 * MISS_AND_HIT
        await service.write(works(update(table).where(table.c.id == 1, table.c.day == 10).values(name=written)))
        answers = [(await service.get(path)).json() for path in paths]
        assert answers == [[written, "b"], [written], [written], written]
        await service.write(works(update(tables["days"]).where(tables["days"].c.id == 0).values(name="")))
    # Of the whole table rows are told apart.
    await service.marks("/days/1/10")
    table = tables["days"]
    await service.write(works(update(table).where(table.c.id == 2, table.c.day == 110).values(name="f")))
    assert await service.marks("/days/1/10") == ["hit"]


# Names


async def test_one_table_has_one_name_wherever_it_is_sent_to(service: Service) -> None:
    run(service, "CREATE SCHEMA a; CREATE TABLE a.items (id serial PRIMARY KEY, name text, parent_id int)")
    run(service, "CREATE SCHEMA b; CREATE TABLE b.items (id serial PRIMARY KEY, name text, parent_id int)")
    lists(service, "/qualified", named("items", "public"))
    lists(service, "/a", named("items", "a"))

    @service.app.get("/of/{schema}")
    @cached
    async def mapped(schema: str, db: SessionDep) -> list[str]:
        options = {"schema_translate_map": {None: schema}}
        return list(await db.scalars(select(Item.name).order_by(Item.id), execution_options=options))

    async def into_a(db: AsyncSession) -> None:
        options = {"schema_translate_map": {None: "a"}}
        await db.execute(insert(Item).values(name="of a"), execution_options=options)

    paths = ["/names", "/qualified", "/a", "/of/a", "/of/b"]
    assert await service.marks(*(path for path in paths for _ in range(2))) == 5 * MISS_AND_HIT
    await service.write(works(insert(Item).values(name="new")))
    assert [(await service.get(path)).json() for path in ("/names", "/qualified")] == 2 * [["first", "new"]]
    assert await service.marks("/a") == ["hit"]
    await service.write(into_a)
    assert [(await service.get(path)).json() for path in ("/a", "/of/a", "/of/b")] == [["of a"], ["of a"], []]
    assert await service.marks("/a", "/of/a", "/of/b") == 3 * ["hit"]
    await service.write(works(insert(named("items", "a")).values(name="more")))
    assert [(await service.get(path)).json() for path in ("/a", "/of/a")] == 2 * [["of a", "more"]]


async def test_a_search_path_set_for_a_tenant_is_nothing_to_keep_by(on_asyncpg: Service) -> None:
    run(on_asyncpg, "CREATE SCHEMA a; CREATE TABLE a.items (id serial PRIMARY KEY, name varchar)")

    @on_asyncpg.app.get("/of/{schema}")
    @cached
    async def of(schema: str, db: SessionDep) -> list[str]:
        await db.execute(text(f"SET LOCAL search_path = {schema}"))
        return list(await db.scalars(select(named("items").c.name)))

    for schema, names in (("a", []), ("public", ["first"]), ("a", [])):
        answer = await on_asyncpg.get(f"/of/{schema}")
        assert (answer.json(), answer.headers["cache-status"]) == (names, UNKNOWN)


async def test_a_temporary_table_hides_another_on_its_connection(service: Service) -> None:
    async def hide(db: AsyncSession) -> None:
        await db.execute(text("CREATE TEMP TABLE IF NOT EXISTS items (LIKE items)"))

    lists(service, "/others", named("others"))
    assert await service.marks("/names", "/names") == MISS_AND_HIT
    await service.write(hide)
    answer = await service.get()
    assert (answer.json(), answer.headers["cache-status"]) == ([], "overdrive; fwd=stale; detail=unknown-reads")
    assert await service.marks("/others", "/others") == MISS_AND_HIT
    await service.overdrive.engine.dispose()
    assert (await service.get()).json() == ["first"]
    assert await service.marks("/names") == ["hit"]


# When the database is asked


async def test_it_is_asked_with_its_first_connection_alone(service: Service, asked: list[Any]) -> None:
    lists(service, "/others", named("others"))

    @service.app.get("/page", response_model=Page[str])
    async def page(db: SessionDep) -> Any:
        return await paginate(db, select(Item.name).order_by(Item.id))

    for _ in range(3):
        await service.marks("/names", "/others", "/page")
        await service.write(works(insert(Item).values(name="new")))
    assert asked == [frozenset()]


async def test_a_view_is_asked_for_once(service: Service, asked: list[Any]) -> None:
    run(service, "CREATE VIEW seen AS SELECT id, name FROM items")
    lists(service, "/seen", named("seen"))
    for _ in range(3):
        await service.marks("/seen")
        await service.write(works(insert(Item).values(name="new")))
    assert asked == [frozenset(), {"seen"}]


async def test_with_every_connection_but_not_every_time(
    emptied: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_async_engine(emptied, poolclass=NullPool)
    observe.observe(engine.sync_engine, "main")

    async def connect() -> None:
        async with engine.connect() as connection:
            await connection.execute(select(literal(1)))

    for _ in range(3):
        await connect()
    assert len(asked) == 1
    monkeypatch.setattr(naming, "_TOLD", 0.0)
    await connect()
    assert len(asked) == 2


@pytest.fixture
def reader(emptied: str) -> Iterator[URL]:
    """The database as a role has it that may read one view of `items`, and nothing else."""
    owner = outside(emptied)
    with owner.begin() as connection:
        connection.exec_driver_sql(
            "CREATE ROLE reader LOGIN; CREATE TABLE items (id int); CREATE VIEW seen AS SELECT id FROM items;"
            "GRANT USAGE ON SCHEMA public TO reader; GRANT SELECT ON seen TO reader"
        )
    yield make_url(emptied).set(username="reader")
    with owner.begin() as connection:
        connection.exec_driver_sql("DROP OWNED BY reader; DROP ROLE reader")
    owner.dispose()


async def test_a_role_without_rights_learns_as_much(reader: URL) -> None:
    engine = create_async_engine(reader)
    observe.observe(engine.sync_engine, "main")
    with collecting() as reads:
        async with engine.connect() as connection:
            await connection.execute(select(named("seen").c.id))
    assert (reads.unknown, "main/items" in reads.tags) == ([], True)
    await engine.dispose()


async def test_statements_that_change_tables_have_it_asked_again(service: Service) -> None:
    run(service, "CREATE TABLE hers (id int, name text); CREATE VIEW seen AS SELECT id, name FROM items")
    lists(service, "/seen", named("seen"))
    assert await service.marks("/seen", "/seen") == MISS_AND_HIT
    await service.write(works(text("CREATE OR REPLACE VIEW seen AS SELECT id, name::varchar FROM others")))
    assert await service.marks("/seen", "/seen") == MISS_AND_HIT
    await service.write(works(insert(Other).values(name="new")))
    assert (await service.get("/seen")).json() == ["other", "new"]


async def test_what_is_not_committed_is_not_believed(service: Service) -> None:
    async def undone(db: AsyncSession) -> None:
        await db.execute(text("ALTER TABLE others RENAME TO gone"))
        await db.execute(text("CREATE VIEW others AS SELECT id, name FROM items"))
        await db.execute(select(named("others")))
        await db.rollback()

    lists(service, "/others", named("others"))
    await service.write(undone)
    assert await service.marks("/others", "/others") == MISS_AND_HIT
    await service.write(works(insert(Other).values(name="new")))
    assert (await service.get("/others")).json() == ["other", "new"]


class Witness:
    """Notes whether anything is known when a commit has ended and others may be told."""

    def __init__(self) -> None:
        self.known: list[bool] = []
        self.observation: observe.Observation

    async def before(self, writes: frozenset[str], sql: str) -> None:
        pass

    async def after(self, token: None, outcome: observe.Outcome) -> None:
        self.known.append(self.observation.naming._told.relations is not None)


async def test_what_was_asked_before_a_change_was_committed_is_forgotten_with_it(service: Service) -> None:
    witness = Witness()
    engine = service.overdrive.engine
    witness.observation = observe.observe(engine.sync_engine, "default", witness)
    async with engine.connect() as one, engine.connect() as other:
        await one.execute(text("CREATE VIEW more AS SELECT id, name FROM items"))
        await other.execute(select(Item))
        assert witness.observation.naming._told.relations is not None
        await one.commit()
    assert witness.known == [False]


async def test_an_answer_from_before_a_change_is_not_believed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = observe.observe(service.overdrive.engine.sync_engine, "default")

    def overtaken(*asked: Any) -> Any:
        told = catalogue.relations_of(*asked)
        observation.naming.forget()
        return told

    monkeypatch.setattr(naming, "relations_of", overtaken)
    assert (await service.get()).headers["cache-status"] == UNKNOWN
    monkeypatch.undo()
    assert await service.marks("/names", "/names") == MISS_AND_HIT


async def test_a_transaction_is_not_harmed_by_asking(service: Service, silent: pytest.MonkeyPatch) -> None:
    async def write_and_read(db: AsyncSession) -> None:
        await db.execute(insert(Item).values(name="second"))
        await db.execute(select(Item))

    assert await service.write(write_and_read) == 200
    assert (await service.get()).json() == ["first", "second"]


async def test_what_another_has_made_is_learned_with_the_next_connection(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "_TOLD", 0.0)
    lists(service, "/others", named("others"))
    await service.marks("/others")
    run(service, "ALTER TABLE others RENAME TO gone; CREATE VIEW others AS SELECT id, name FROM items")
    await service.overdrive.engine.dispose()
    await service.overdrive.cache.clear()
    assert await service.marks("/names", "/others", "/others") == ["miss", *MISS_AND_HIT]
    await service.write(works(insert(Item).values(name="new")))
    assert (await service.get("/others")).json() == ["first", "new"]


async def test_a_table_made_since_is_asked_for(service: Service) -> None:
    lists(service, "/late", named("late"))
    await service.marks("/names")
    run(service, "CREATE TABLE late (id int PRIMARY KEY, name text)")
    assert await service.marks("/late", "/late") == MISS_AND_HIT


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A database that does not let itself be asked."""
    monkeypatch.setattr(naming, "_TOLD", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "_RELATIONS", "SELECT nothing")
        patched.setattr(catalogue, "_DATABASES", "SELECT nothing")
        yield patched


async def test_nothing_is_kept_until_the_database_has_answered(
    on_each_driver: Service, silent: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = on_each_driver
    for _ in range(2):
        assert (await service.get()).headers["cache-status"] == UNKNOWN
    assert "the database did not say what its tables are" in caplog.text
    silent.undo()
    assert await service.marks("/names", "/names") == MISS_AND_HIT
    await service.write(works(insert(Item).values(name="new")))
    assert (await service.get()).json() == ["first", "new"]


async def test_a_write_to_what_nobody_knows_is_one_to_everything(
    on_each_driver: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = on_each_driver
    lists(service, "/others", named("others"))
    assert await service.marks("/others", "/others") == MISS_AND_HIT
    service.overdrive._observations[0].naming.forget()
    monkeypatch.setattr(naming.Naming, "ask", lambda *_: None)
    await service.write(works(insert(Item).values(name="new")))
    monkeypatch.undo()
    assert await service.marks("/others") == ["miss"]


async def test_plain_functions_and_connections_older_than_the_observation(url: str) -> None:
    async with serve(url) as service:
        engine = service.overdrive.sync_sessions().engine
        event.remove(engine, "connect", service.overdrive._observations[-1]._connected)

        @service.app.get("/plain")
        @cached
        def plain(db: SyncSessionDep) -> list[str]:
            return list(db.scalars(select(Item.name)))

        assert await service.marks("/plain", "/plain") == MISS_AND_HIT
