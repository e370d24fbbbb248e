"""What PostgreSQL announces of each kind of write, and what install, uninstall and status make of a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, Uuid, create_engine, select
from sqlalchemy.exc import ProgrammingError
from support import outside

from overdrive.errors import ConfigurationError
from overdrive.pool.outside import LOCK_TIMEOUT, Database, explained, installation, keys_of, removal, run
from overdrive.pool.rows import MOST, tag_of_row
from overdrive.pool.statement import facts_of
from overdrive.pool.triggers import CHANGED, CHANNEL, Via, tags_of

VIAS = pytest.mark.parametrize("via", ["notify", "outbox"])
SCHEMA = """
CREATE TABLE items (id int PRIMARY KEY, name text);
CREATE TABLE parts (id bigint PRIMARY KEY, item_id int REFERENCES items ON DELETE CASCADE);
CREATE TABLE uuids (id uuid PRIMARY KEY, name text);
CREATE TABLE pairs (b int, a uuid, name text, PRIMARY KEY (b, a));
CREATE TABLE texts (id text PRIMARY KEY, name text);
CREATE TABLE bare (name text);
CREATE TABLE "Größe's ""%s"" {x}" ("Der ""Schlüssel"" x" int PRIMARY KEY, name text);
CREATE TABLE days (id int, day int, name text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM (0) TO (100);
CREATE TABLE days_2 PARTITION OF days FOR VALUES FROM (100) TO (200);
CREATE TABLE animals (id int PRIMARY KEY, name text);
CREATE TABLE birds (wings int) INHERITS (animals);
CREATE SCHEMA shop;
CREATE TABLE shop.items (id int PRIMARY KEY, name text);
CREATE TABLE shop.orders (id int PRIMARY KEY, name text);
CREATE VIEW seen AS SELECT * FROM items;
"""
ODD = """Größe's "%s" {x}"""
QUOTED = '''"Größe's ""%s"" {x}"'''
U1, U2 = UUID(int=1), UUID(int=2)


@pytest.fixture
def connection(postgres_url: str) -> Iterator[Connection]:
    engine = outside(postgres_url)
    with engine.connect() as connection:
        empty(connection)
        for sql in SCHEMA.split(";\n"):
            if sql.strip():
                run(connection, sql)
        connection.commit()
        yield connection
        connection.rollback()
        empty(connection)
        connection.commit()
    engine.dispose()


def empty(connection: Connection) -> None:
    run(connection, "DROP SCHEMA public CASCADE; DROP SCHEMA IF EXISTS shop CASCADE")
    run(connection, "CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")


def url_of(connection: Connection) -> str:
    return connection.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def planned(connection: Connection, *only: str, via: Via = "notify") -> list[str]:
    database = Database(connection)
    return list(installation(database, database.announced(None, only), via))


def carry_out(connection: Connection, statements: list[str]) -> None:
    for sql in statements:
        run(connection, sql)
    connection.commit()


def install(connection: Connection, *only: str, via: Via = "notify") -> list[str]:
    statements = planned(connection, *only, via=via)
    carry_out(connection, statements)
    return statements


def uninstall(connection: Connection, *only: str) -> list[str]:
    statements = list(removal(Database(connection), only))
    carry_out(connection, statements)
    return statements


def states(connection: Connection, *only: str) -> dict[str, str]:
    database = Database(connection)
    found = {f"{each.schema}.{each.name}": database.state(each) for each in database.announced(None, only)}
    connection.rollback()
    return found


@pytest.fixture
def told(connection: Connection) -> Iterator[Callable[[str], set[str]]]:
    """Executes SQL as psql does, each statement by itself, and returns the tags that were announced."""
    install(connection)
    install(connection, "shop.items", "shop.orders")
    with psycopg.connect(url_of(connection), autocommit=True) as listening, listening.cursor() as cursor:
        cursor.execute(f"LISTEN {CHANNEL}".encode())

        def announced(sql: str) -> set[str]:
            with psycopg.connect(url_of(connection), autocommit=True) as writing:
                for each in sql.split("; "):
                    writing.execute(each.encode())
                writing.execute(f"NOTIFY {CHANNEL}, 'end'".encode())
            tags: set[str] = set()
            for notice in listening.notifies(timeout=10):
                if notice.payload == "end":
                    return tags
                if notice.payload != CHANGED:
                    tags |= tags_of(notice.payload, "e")
            raise AssertionError("nothing was heard")

        yield announced


def of(*names: str, rows: list[list[Any]] | None = None) -> set[str]:
    """The tags of tables, found on the search path, and of rows; of all rows where none are named."""
    every = {each for name in names for each in (name, f"public.{name}")}
    if rows is None:
        return {f"e/{name}{mark}" for name in every for mark in ("", "#")}
    return {f"e/{name}" for name in every} | {f"e/{tag_of_row(name, row)}" for name in every for row in rows}


def test_each_kind_of_write_announces_what_it_wrote(told: Callable[[str], set[str]]) -> None:
    def check(sql: str, *expected: set[str]) -> None:
        assert told(sql) == set().union(*expected), sql

    check("INSERT INTO items VALUES (1, 'a'), (2, 'b')", of("items", rows=[]))
    check("INSERT INTO parts VALUES (7, 1)", of("parts", rows=[]))
    check("UPDATE items SET name = 'c' WHERE id = 2", of("items", rows=[[2]]))
    check("UPDATE items SET id = 3 WHERE id = 2", of("items", rows=[[2], [3]]))
    check("UPDATE items SET name = 'c' WHERE id = 99", set())
    check("INSERT INTO items VALUES (3, 'd') ON CONFLICT (id) DO UPDATE SET name = 'd'", of("items", rows=[[3]]))
    check("INSERT INTO items VALUES (3, 'd') ON CONFLICT DO NOTHING", set())
    check(
        "MERGE INTO items USING (VALUES (3, 'x'), (4, 'y')) AS v (id, name) ON items.id = v.id "
        "WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.name)",
        of("items", rows=[[3]]),
    )
    check("WITH gone AS (DELETE FROM items WHERE id = 4 RETURNING id) SELECT * FROM gone", of("items", rows=[[4]]))
    check("DELETE FROM items WHERE id = 1", of("items", rows=[[1]]), of("parts", rows=[[7]]))
    check("INSERT INTO items VALUES (5, 'z')", of("items", rows=[]))
    check("TRUNCATE items CASCADE", of("items", "parts"))
    # What is rolled back, or a savepoint of it, is not announced.
    check("BEGIN; INSERT INTO items VALUES (8, 'h'); ROLLBACK", set())
    check(
        "BEGIN; INSERT INTO items VALUES (8, 'h'); SAVEPOINT s; INSERT INTO bare VALUES ('x'); ROLLBACK TO s; COMMIT",
        of("items", rows=[]),
    )
    # Many rows are the whole table.
    check(f"INSERT INTO items SELECT g, 'n' FROM generate_series(100, {100 + MOST}) g", of("items", rows=[]))
    check("UPDATE items SET name = 'm' WHERE id BETWEEN 100 AND 149", of("items", rows=[[n] for n in range(100, 150)]))
    check("UPDATE items SET name = 'm' WHERE id BETWEEN 100 AND 150", of("items"))
    check("DELETE FROM items", of("items"))
    # Keys of other kinds.
    check(f"INSERT INTO uuids VALUES ('{U1}'); UPDATE uuids SET id = '{U2}'", of("uuids", rows=[[U1], [U2]]))
    check(f"INSERT INTO pairs VALUES (4, '{U1}'); DELETE FROM pairs", of("pairs", rows=[[U1, 4]]))
    check("INSERT INTO texts VALUES ('a'); DELETE FROM texts", of("texts"))
    check("INSERT INTO bare VALUES ('a'); UPDATE bare SET name = 'b'", of("bare"))
    check(f"INSERT INTO {QUOTED} VALUES (1); DELETE FROM {QUOTED}", of(ODD, rows=[[1]]))


def test_copy_is_a_write(connection: Connection, told: Callable[[str], set[str]]) -> None:
    with psycopg.connect(url_of(connection)) as copying, copying.cursor().copy("COPY items FROM STDIN") as copy:
        copy.write_row((1, "a"))
    assert told("SELECT 1") == of("items", rows=[])


def test_partitions_and_heirs_are_written_with_their_parents(told: Callable[[str], set[str]]) -> None:
    days = ("days", "days_1", "days_2")
    assert told("INSERT INTO days VALUES (1, 50)") == of(*days, rows=[])
    assert told("UPDATE days SET day = 150") == of(*days, rows=[[50, 1], [150, 1]]) | of(*days, rows=[[50, 1]])
    # By its own name, a partition is a part of its parent and of no other.
    assert told("DELETE FROM days_2") == of("days", "days_2", rows=[[150, 1]])
    assert told("TRUNCATE days") == of(*days)
    # An heir has no primary key of its own.
    assert told("INSERT INTO birds VALUES (1, 'a', 2)") == of("animals", "birds", rows=[])
    assert told("UPDATE animals SET name = 'b'") == of("animals", rows=[[1]]) | of("birds")
    assert told("DELETE FROM birds") == of("animals", "birds")


def test_tables_of_one_name_in_two_schemas_are_two(told: Callable[[str], set[str]]) -> None:
    assert told("INSERT INTO shop.items VALUES (1)") == {"e/shop.items"}
    assert told("DELETE FROM shop.items") == {"e/shop.items", "e/" + tag_of_row("shop.items", [1])}
    assert told("INSERT INTO items VALUES (1)") == of("items", rows=[])


def test_a_write_is_never_refused_because_of_its_announcement(told: Callable[[str], set[str]]) -> None:
    """Neither by a key that was renamed, nor by a table that was."""
    assert told("ALTER TABLE items RENAME COLUMN id TO number; INSERT INTO items VALUES (1); DELETE FROM items") == (
        of("items")
    )
    assert told("ALTER TABLE uuids ALTER id TYPE text; INSERT INTO uuids VALUES ('a'); DELETE FROM uuids") == of(
        "uuids"
    )
    assert told("ALTER TABLE bare RENAME TO bears; INSERT INTO bears VALUES ('a')") == of("bears", rows=[])


def test_keys_and_names_too_long_for_a_notification(connection: Connection, told: Callable[[str], set[str]]) -> None:
    columns = ", ".join(f"c{n} uuid DEFAULT gen_random_uuid()" for n in range(8))
    run(connection, f"CREATE TABLE long ({columns}, PRIMARY KEY ({', '.join(f'c{n}' for n in range(8))}))")
    run(connection, "CREATE TABLE many (id int PRIMARY KEY) PARTITION BY LIST (id)")
    for number in range(80):
        run(connection, f"CREATE TABLE {'m' * 60}_{number} PARTITION OF many FOR VALUES IN ({number})")
    install(connection, "long", "many")
    inserted = f"INSERT INTO long SELECT FROM generate_series(1, {MOST})"
    assert told(f"{inserted}; DELETE FROM long") == of("long")
    assert told("INSERT INTO many VALUES (1)") == {"e/*"}


@given(st.text())
def test_what_is_not_understood_means_everything(text: str) -> None:
    assert tags_of(text, "e") == {"e/*"}


@pytest.mark.parametrize("keys", ['[["x"]]', "[[null]]", "[[1.5]]", "[[true]]", "7"])
def test_keys_that_are_none_mean_everything(keys: str) -> None:
    assert tags_of(f'{{"keyed": ["t"], "others": [], "keys": {keys}}}', "e") == {"e/*"}


def test_models_and_database_name_a_row_alike_in_whatever_order(told: Callable[[str], set[str]]) -> None:
    pairs = Table("pairs", MetaData(), Column("b", Integer, primary_key=True), Column("a", Uuid, primary_key=True))
    compiled = select(pairs).where(pairs.c.b == 4, pairs.c.a == U1).compile()
    (rows,) = facts_of(compiled, "").rows_read
    read = rows.tags([compiled.params])
    assert read is not None
    assert {f"e/{tag}" for tag in read} < told(f"INSERT INTO pairs VALUES (4, '{U1}'); DELETE FROM pairs")


# Install, uninstall, status


def everything(connection: Connection) -> list[Any]:
    """All there is in the catalogues that might be ours."""
    queries = (
        "SELECT tgrelid::regclass::text, tgname::text FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2",
        "SELECT proname::text FROM pg_proc WHERE pronamespace NOT IN (11, 'information_schema'::regnamespace)",
        "SELECT relname::text FROM pg_class WHERE relnamespace <> 11 ORDER BY 1",
        "SELECT description FROM pg_description WHERE description LIKE 'overdrive%'",
    )
    found = [list(run(connection, sql)) for sql in queries]
    connection.rollback()
    return found


def test_install_is_done_once_and_undone_wholly(connection: Connection) -> None:
    before = everything(connection)
    assert set(states(connection).values()) == {"missing"}
    for via in ("notify", "outbox", "notify", "outbox"):
        assert install(connection, via=via) != []
        assert set(states(connection).values()) == {"installed"}
        assert install(connection, via=via) == []
    uninstall(connection, "items")
    assert states(connection)["public.items"] == "missing"
    assert states(connection)["public.parts"] == "installed"
    uninstall(connection)
    assert everything(connection) == before
    assert uninstall(connection) == []


def test_the_state_says_what_is_wrong(connection: Connection) -> None:
    install(connection)
    run(connection, "ALTER TABLE items DISABLE TRIGGER overdrive_update")
    run(connection, "DROP TRIGGER overdrive_delete ON parts")
    run(connection, "ALTER TABLE uuids DROP CONSTRAINT uuids_pkey")
    connection.commit()
    found = states(connection)
    assert [found[f"public.{name}"] for name in ("items", "parts", "uuids", "pairs")] == [
        "disabled",
        "outdated",
        "outdated",
        "installed",
    ]
    install(connection)
    assert set(states(connection).values()) == {"installed"}
    run(connection, "COMMENT ON FUNCTION overdrive_announce() IS 'overdrive triggers 0, via notify'")
    connection.commit()
    assert set(states(connection).values()) == {"outdated"}
    install(connection)
    assert set(states(connection).values()) == {"installed"}


def test_models_say_which_tables_and_by_which_keys(connection: Connection) -> None:
    metadata = MetaData()
    Table("items", metadata, Column("name", String), Column("id", Integer, primary_key=True))
    Table("pairs", metadata, Column("b", Integer, primary_key=True), Column("name", String))
    Table("uuids", metadata, Column("id", Uuid(as_uuid=False), primary_key=True))
    Table("orders", metadata, Column("id", Integer, primary_key=True), schema="shop")
    Table("nowhere", metadata, Column("id", Integer, primary_key=True))
    found = Database(connection).announced(keys_of([metadata]))
    assert [(each.schema, each.name, each.key) for each in found] == [
        ("public", "items", ("id",)),
        ("public", "pairs", ("b",)),
        ("public", "uuids", ()),
        ("shop", "orders", ("id",)),
    ]


def test_an_unknown_table_is_refused_with_a_hint(connection: Connection) -> None:
    database = Database(connection)
    for name, hint in (
        ("item", "did you mean 'items'"),
        ("seen", "is a view"),
        ("zzz", "there are "),
        ("", "no table"),
    ):
        with pytest.raises(ConfigurationError, match=hint):
            database.announced(None, [name])


def test_only_postgresql_has_them() -> None:
    with create_engine("sqlite://").connect() as connection, pytest.raises(ConfigurationError, match="PostgreSQL"):
        Database(connection)


@pytest.mark.parametrize(
    ("prepared", "cure"),
    [("SET ROLE nobody_in_particular", "owns the tables"), ("SET TRANSACTION READ ONLY", "connect to the primary")],
)
def test_what_the_database_refuses_names_the_fix(connection: Connection, prepared: str, cure: str) -> None:
    run(connection, "DO $$BEGIN CREATE ROLE nobody_in_particular; EXCEPTION WHEN duplicate_object THEN NULL; END$$")
    connection.commit()
    run(connection, prepared)
    with pytest.raises(ConfigurationError, match=cure), explained():
        install(connection)


def test_a_table_that_is_in_use_is_not_waited_for_for_ever(connection: Connection) -> None:
    with psycopg.connect(url_of(connection)) as other:
        other.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        run(connection, "SET lock_timeout = '50ms'")
        first, *others = (sql for sql in planned(connection) if sql != LOCK_TIMEOUT)
        run(connection, first)
        with pytest.raises(ConfigurationError, match="in use"), explained():
            carry_out(connection, others)


@VIAS
def test_nobody_else_can_use_the_function(connection: Connection, via: Via) -> None:
    """With the outbox it runs as its owner: a trigger with other arguments must not be anybody's."""
    run(connection, "DO $$BEGIN CREATE ROLE nobody_in_particular; EXCEPTION WHEN duplicate_object THEN NULL; END$$")
    install(connection, via=via)
    run(connection, "GRANT CREATE ON SCHEMA public TO nobody_in_particular")
    run(connection, "SET ROLE nobody_in_particular")
    run(connection, "CREATE TABLE mine (id int)")
    with pytest.raises(ProgrammingError, match="permission denied for function"):
        run(connection, "CREATE TRIGGER mine AFTER TRUNCATE ON mine EXECUTE FUNCTION overdrive_announce()")


@VIAS
def test_names_in_the_arguments_are_only_names(connection: Connection, via: Via) -> None:
    run(connection, 'CREATE TABLE odd ("id), (SELECT 1/0" int PRIMARY KEY)')
    install(connection, "odd", via=via)
    run(connection, "INSERT INTO odd VALUES (1); DELETE FROM odd")


def test_who_writes_needs_no_right_to_the_outbox(connection: Connection) -> None:
    run(connection, "DO $$BEGIN CREATE ROLE nobody_in_particular; EXCEPTION WHEN duplicate_object THEN NULL; END$$")
    install(connection, via="outbox")
    run(connection, "GRANT INSERT ON items TO nobody_in_particular")
    run(connection, "SET ROLE nobody_in_particular")
    run(connection, "INSERT INTO items VALUES (1)")
    run(connection, "RESET ROLE")
    assert [tags_of(payload, "e") for (payload,) in run(connection, "SELECT payload FROM overdrive_outbox")] == [
        of("items", rows=[])
    ]
