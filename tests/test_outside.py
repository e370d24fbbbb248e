"""Writes from outside, seen by an app: through triggers, a listener and the cache; and the commands around them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from cache.conftest import patient as patient
from cache.service import Service, add_routes
from fastapi import FastAPI
from shell import Command
from sqlalchemy import insert, select
from support import Base, Item, client, eventually, on_uvicorn, outside, tables

from overdrive import Overdrive, SessionDep, Settings, cached, cli
from overdrive.cache.store import StoreUnavailable
from overdrive.compat.alembic import include_object
from overdrive.errors import ConfigurationError
from overdrive.pool import listener
from overdrive.pool.outside import Database, installation, keys_of, run
from overdrive.pool.triggers import Via

pytestmark = pytest.mark.anyio

DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
VIAS = pytest.mark.parametrize("via", ["notify", "outbox"])


def install(url: str, via: Via = "notify") -> None:
    engine = outside(url)
    with engine.begin() as connection:
        database = Database(connection)
        for sql in installation(database, database.announced(keys_of([Base.metadata])), via):
            run(connection, sql)
    engine.dispose()


@contextlib.contextmanager
def psql(url: str) -> Iterator[psycopg.Connection[Any]]:
    """What another program has."""
    with psycopg.connect(url.replace("+asyncpg", "").replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


@asynccontextmanager
async def listening(url: str, redis_url: str | None = None, **cache: Any) -> AsyncIterator[Service]:
    """An app that hears, with a cached list and a cached row."""
    app = FastAPI()
    settings = Settings.load(database_url=url, redis_url=redis_url, cache={"listen": True, **cache})
    overdrive = Overdrive(app, settings=settings, cache=True)
    async with client(app) as http:
        service = Service(app, overdrive, http, outside(url))
        add_routes(service)

        @app.get("/items/{item_id}")
        @cached
        async def item(item_id: int, db: SessionDep) -> str | None:
            return await db.scalar(select(Item.name).where(Item.id == item_id))

        overdrive.enter_loop()
        await eventually(lambda: not overdrive.cache.invalidator.is_behind)
        try:
            yield service
        finally:
            await overdrive.aclose()
            service.database.dispose()


@pytest.fixture
def database(postgres_database: str) -> str:
    with tables(postgres_database) as engine, engine.begin() as connection:
        connection.execute(insert(Item).values([{"name": "first"}, {"name": "second"}]))
    return postgres_database


async def changed(service: Service, path: str, before: Any) -> Any:
    """What the app answers as soon as it is something else."""
    for _ in range(250):
        if (answer := (await service.get(path)).json()) != before:
            return answer
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} is still {before}")


async def test_an_app_that_starts_again_in_its_loop_hears_again(database: str) -> None:
    install(database)
    async with listening(database) as service:
        await service.overdrive.aclose()
        assert service.overdrive.cache.invalidator.is_deaf
        service.overdrive.installation.started()
        await eventually(lambda: not service.overdrive.cache.invalidator.is_deaf)
        assert await service.marks("/names", "/names") == ["miss", "hit"]


@DRIVERS
@VIAS
async def test_a_write_of_psql_is_seen(database: str, driver: str, via: Via) -> None:
    install(database, via)
    async with listening(database.replace("asyncpg", driver)) as service:
        assert await service.marks("/names", "/names", "/items/1", "/items/1", "/items/2", "/items/2") == (
            ["miss", "hit"] * 3
        )
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'changed' WHERE id = 1")
            assert await changed(service, "/names", ["first", "second"]) == ["changed", "second"]
            # Only what read that row, or the table, is dropped.
            assert await service.marks("/items/1", "/items/2") == ["miss", "hit"]
            connection.execute("TRUNCATE items")
            assert await changed(service, "/names", ["changed", "second"]) == []
            await service.marks("/names")
            connection.execute("NOTIFY overdrive")
            await eventually_miss(service, "/names")


async def test_what_triggers_tell_is_remembered_as_theirs(database: str, redis_url: str) -> None:
    install(database)
    async with listening(database, redis_url) as service:
        await service.marks("/names")
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'changed' WHERE id = 1")
        await changed(service, "/names", ["first", "second"])
        (written,) = await service.overdrive.cache.store.history()
        assert (written.writer, "default/items" in written.tags) == ("triggers", True)


async def eventually_miss(service: Service, path: str) -> None:
    for _ in range(250):
        if await service.marks(path) == ["miss"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} is still served")


async def test_a_lost_listener_leaves_nothing_stale(database: str, store_url: str | None) -> None:
    install(database)
    async with listening(database, store_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        with psql(database) as connection:
            # Nobody hears this.
            connection.execute("BEGIN")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE query = 'SELECT pg_backend_pid() AS pid' AND pid <> pg_backend_pid()"
            )
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute("UPDATE items SET name = 'unheard' WHERE id = 1")
            connection.execute("COMMIT")
        assert await changed(service, "/names", ["first", "second"]) == ["unheard", "second"]
        await eventually(lambda: not service.overdrive.cache.invalidator.is_behind)
        await service.marks("/names")
        assert await service.marks("/names") == ["hit"]


async def test_nothing_is_served_while_nobody_listens(database: str, store_url: str | None) -> None:
    install(database)
    async with listening(database, store_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        (each,) = service.overdrive.cache.invalidator.listeners
        assert isinstance(each, listener.Listener)
        await each.aclose()
        assert await service.marks("/names", "/names") == ["bypass", "bypass"]
        each.start()
        await eventually(lambda: not each.is_deaf)
        # What was kept is of before.
        assert await service.marks("/names", "/names") == ["miss", "hit"]


@pytest.fixture(params=["memory", "redis"])
def store_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


async def test_an_outbox_is_read_in_the_order_of_commits(database: str) -> None:
    """A row with a lower number and an older transaction may come later, also that of a prepared transaction."""
    install(database, "outbox")
    async with listening(database) as service:
        with psql(database) as early, psql(database) as late, psql(database) as prepared:
            early.execute("BEGIN")
            early.execute("UPDATE items SET name = 'early' WHERE id = 1")
            late.execute("UPDATE items SET name = 'late' WHERE id = 2")
            await changed(service, "/items/2", "second")
            assert await service.marks("/items/1", "/items/1") == ["miss", "hit"]
            early.execute("COMMIT")
            assert await changed(service, "/items/1", "first") == "early"
            prepared.execute("BEGIN")
            prepared.execute("UPDATE items SET name = 'prepared' WHERE id = 1")
            prepared.execute("PREPARE TRANSACTION 'one'")
            late.execute("UPDATE items SET name = 'later' WHERE id = 2")
            await changed(service, "/items/2", "late")
            assert await service.marks("/items/1") == ["hit"]
            prepared.execute("COMMIT PREPARED 'one'")
            assert await changed(service, "/items/1", "early") == "prepared"
            # What came with another server's dump is of no transaction here, and not announced at each look.
            late.execute("INSERT INTO overdrive_outbox (transaction, payload) VALUES (1::bigint << 40, '')")
            await service.marks("/items/1")
            await asyncio.sleep(0.1)
            assert await service.marks("/items/1") == ["hit"]


async def test_an_outbox_is_pruned(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_KEPT", 0.2)
    install(database, "outbox")
    async with listening(database):
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'x'")
            left = connection.execute("SELECT count(*) FROM overdrive_outbox").fetchone()
            assert left == (1,)
            await eventually(lambda: connection.execute("SELECT count(*) FROM overdrive_outbox").fetchone() == (0,))


_WORKER = """
import asyncio, sys
from fastapi import FastAPI
from overdrive import Overdrive, Settings

async def main(url, redis_url):
    settings = Settings.load(database_url=url, redis_url=redis_url, cache={"listen": True})
    overdrive = Overdrive(FastAPI(), settings=settings, cache=True)
    overdrive.enter_loop()
    while overdrive.cache.invalidator.is_behind:
        await asyncio.sleep(0.01)
    print("listens", flush=True)
    await asyncio.sleep(100)

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def worker(url: str, redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the same service, once it listens."""
    command = [sys.executable, "-c", _WORKER, url, redis_url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_one_process_listens_and_another_takes_over(database: str, redis_url: str) -> None:
    install(database)
    await takes_over(database, redis_url, signal.SIGKILL)


async def takes_over(database: str, redis_url: str, number: int) -> None:
    """Have the leader hit by a signal while psql writes to the items first and second."""
    with worker(database, redis_url) as first, psql(database) as connection:
        async with listening(database, redis_url) as service:
            (ours,) = service.overdrive.cache.invalidator.listeners
            assert isinstance(ours, listener.Listener)
            assert not ours.leads
            assert await service.marks("/names", "/names") == ["miss", "hit"]
            connection.execute("UPDATE items SET name = 'one' WHERE id = 1")
            assert await changed(service, "/names", ["first", "second"]) == ["one", "second"]
            await service.marks("/names")
            first.send_signal(number)
            connection.execute("UPDATE items SET name = 'two' WHERE id = 1")
            assert await changed(service, "/names", ["one", "second"]) == ["two", "second"]
            await eventually(lambda: ours.leads and not ours.is_deaf)
            await service.marks("/names")
            connection.execute("UPDATE items SET name = 'three' WHERE id = 1")
            assert await changed(service, "/names", ["two", "second"]) == ["three", "second"]


async def test_a_leader_that_cannot_tell_the_store_is_no_leader(
    database: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not pass on what it hears is put off by who can."""
    monkeypatch.setattr(listener, "_DEAD", 1.2)
    install(database)
    async with listening(database, redis_url) as one, listening(database, redis_url) as other:
        (first,), (second,) = (each.overdrive.cache.invalidator.listeners for each in (one, other))
        assert isinstance(first, listener.Listener)
        assert isinstance(second, listener.Listener)
        assert (first.leads, second.leads) == (True, False)

        async def refuse(*_write: Any) -> None:
            raise StoreUnavailable("cut off")

        one.overdrive.cache.store.bump = refuse  # type: ignore[method-assign]
        one.overdrive.cache.store.clear = refuse  # type: ignore[method-assign]
        await other.marks("/names")
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'one' WHERE id = 1")
        assert await changed(other, "/names", ["first", "second"]) == ["one", "second"]
        await eventually(lambda: second.leads and not second.is_deaf)


async def test_a_pooler_in_between_is_noticed(database: str, caplog: pytest.LogCaptureFixture) -> None:
    install(database)
    async with listening(database) as service:
        (each,) = service.overdrive.cache.invalidator.listeners
        assert isinstance(each, listener.Listener)
        asked = listener._Asyncpg.ask

        async def other_backend(self: Any, sql: str, *values: Any) -> Any:
            found = await asked(self, sql, *values)
            return {**found, "pid": -1} if sql == listener._BEATING else found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(listener._Asyncpg, "ask", other_backend)
            await eventually(lambda: each.is_deaf)
        assert "cache.direct_url" in caplog.text


async def test_the_listener_may_go_another_way(database: str) -> None:
    """Past a pooler: its URL is another one than the engine's."""
    install(database)
    async with listening(
        database, direct_url=f"{database.replace('asyncpg', 'psycopg')}?application_name=straight"
    ) as service:
        with psql(database) as connection:
            found = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'straight'"
            ).fetchone()
            assert found == (1,)
            connection.execute("UPDATE items SET name = 'x'")
        assert await changed(service, "/names", ["first", "second"]) == ["x", "x"]


async def test_triggers_may_come_and_change_while_it_listens(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with listening(database) as service:
        assert "overdrive triggers install" in caplog.text
        names = ["first", "second"]
        for via in ("notify", "outbox", "notify"):
            install(database, via)
            # What it hears of the change drops everything once; what comes then is heard in the new way.
            for number in range(2):
                with psql(database) as connection:
                    connection.execute("UPDATE items SET name = %s", (f"{via} {number} {names[0]}"[:40],))
                names = await changed(service, "/names", names)
                await service.marks("/names")


def test_only_postgresql_can_be_listened_to(sqlite_url: str) -> None:
    settings = Settings.load(database_url=sqlite_url, cache={"listen": True})
    with pytest.raises(ConfigurationError, match=r"cache\.listen is for PostgreSQL"):
        Overdrive(FastAPI(), settings=settings)


async def test_listening_begins_with_the_app(database: str) -> None:
    """Before the first request."""
    install(database)
    app = FastAPI()
    settings = Settings.load(database_url=database, cache={"listen": True})
    served = Overdrive(app, settings=settings, cache=True)
    with on_uvicorn(app):
        await eventually(lambda: not served.cache.invalidator.is_behind)


# The command line

_APP = """
from fastapi import FastAPI
from sqlalchemy import Column, Integer, MetaData, String, Table
from overdrive import Overdrive

metadata = MetaData()
Table("items", metadata, Column("id", Integer, primary_key=True), Column("name", String))
Table("nowhere", metadata, Column("id", Integer, primary_key=True))
app = FastAPI()
Overdrive(app)
"""


def test_the_commands(
    overdrive: Command,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["overdrive", "triggers", *arguments, "--database-url", database])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    (tmp_path / "shop.py").write_text(_APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVERDRIVE_DATABASE_URL", database)
    printed = overdrive("triggers", "install", "shop:app", "--dry-run")
    assert (printed.returncode, printed.stderr) == (0, "overdrive: not in this database: nowhere\n")
    status, said = command("status", "--table", "items")
    assert (status, "missing" in said) == (1, True)
    with psql(database) as connection:
        connection.execute(printed.stdout.encode())
        # What was printed is what is executed: there is nothing left to do.
        assert command("install", "--table", "items") == (0, "nothing is to be done\n")
        status, said = command("status", "--table", "items")
        assert (status, "installed" in said, "via: notify" in said) == (0, True, True)
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET session_replication_role = replica")
        status, said = command("status", "--table", "items")
        assert (status, "session_replication_role: replica" in said) == (1, True)
        assert "done, in one transaction" in command("uninstall")[1]
        assert connection.execute("SELECT count(*) FROM pg_proc WHERE proname LIKE 'overdrive%'").fetchone() == (0,)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("install",), "which database?"),
        (("install", "--database-url", "sqlite://"), "triggers are for PostgreSQL"),
        (("install", "--database-url", "{url}", "--via", "pigeon"), "--via is notify or outbox"),
        (("install", "--database-url", "{url}", "--table", "itens"), "did you mean 'items'?"),
        (("uninstall", "--database-url", "{url}", "--table", "items"), "has no triggers"),
        (("install", "--database-url", "postgresql://127.0.0.1:1/x"), "cannot be reached"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    database: str, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["overdrive", "triggers", *(each.format(url=database) for each in arguments)])
    with pytest.raises(SystemExit, match=re.escape(complaint)) as ended:
        cli.main()
    assert len(str(ended.value).splitlines()) == 1


# Alembic


def migrated(url: str, work: Callable[[Operations], None]) -> list[Any]:
    """What autogenerate finds after a migration."""
    engine = outside(url)
    with engine.connect() as connection:
        options = {"include_object": include_object, "target_metadata": Base.metadata}
        context = MigrationContext.configure(connection, opts=options)
        with context.begin_transaction(), Operations.context(context) as op:
            work(op)
        found = compare_metadata(context, Base.metadata)
    engine.dispose()
    return found


def states(url: str) -> dict[str, str]:
    engine = outside(url)
    with engine.connect() as connection:
        database = Database(connection)
        found = {each.name: database.state(each) for each in database.announced(None)}
    engine.dispose()
    return found


def test_a_migration_installs_and_uninstalls(database: str) -> None:
    def upgrade(op: Any) -> None:
        op.install_overdrive_triggers(via="outbox")

    def downgrade(op: Any) -> None:
        op.uninstall_overdrive_triggers()

    assert migrated(database, upgrade) == []
    assert states(database) == {"items": "installed", "others": "installed"}
    assert migrated(database, downgrade) == []
    assert states(database) == {"items": "missing", "others": "missing"}
    with psql(database) as connection:
        assert connection.execute("SELECT to_regclass('overdrive_outbox')").fetchone() == (None,)


def test_a_migration_may_name_tables_and_models(database: str) -> None:
    def upgrade(op: Any) -> None:
        op.install_overdrive_triggers("items", metadata=Base.metadata)

    assert migrated(database, upgrade) == []
    assert states(database) == {"items": "installed", "others": "missing"}


def test_a_migration_that_prints_sql_says_what_to_do() -> None:
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True})
    with pytest.raises(ConfigurationError, match="--dry-run"), Operations.context(context) as op:
        op.install_overdrive_triggers()  # type: ignore[attr-defined]
