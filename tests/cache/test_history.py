"""Who has outdated an entry: what is remembered of writes, and told by `overdrive explain`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from cache.cluster import RedisCluster
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from support import client, tables

from overdrive import Overdrive
from overdrive.cache.cluster import store_at
from overdrive.cache.entry import Instant
from overdrive.cache.history import Written, of_request, outdated_by, together
from overdrive.cache.invalidation import Invalidator
from overdrive.cache.store import Store, StoreUnavailable
from overdrive.inspection import explain, overdrive_of
from overdrive.pool.observe import Outcome

pytestmark = pytest.mark.anyio

_APP = """
from fastapi import FastAPI
from sqlalchemy import insert, text, update
from support import Item
from overdrive import Overdrive, SessionDep, SyncSessionDep, cached

app = FastAPI()
overdrive = Overdrive(app)

@app.get("/items/{item_id}")
@cached(ttl=60)
async def item(item_id: int, db: SessionDep) -> str:
    return (await db.get_one(Item, item_id)).name

@app.put("/items/{item_id}")
async def change(item_id: int, name: str, db: SessionDep) -> None:
    (await db.get_one(Item, item_id)).name = name

@app.put("/plain/{item_id}")
def change_in_a_thread(item_id: int, name: str, db: SyncSessionDep) -> None:
    db.execute(update(Item).where(Item.id == item_id).values(name=name))

@app.put("/text/{name}")
async def change_by_text(name: str, db: SessionDep) -> None:
    await db.execute(insert(Item).values(name=name))
    await db.execute(text(f"UPDATE items SET name = '{name}'"))

@app.put("/twice/{name}")
async def change_twice(name: str, db: SessionDep) -> None:
    await db.execute(insert(Item).values(name=name))
    await db.commit()
    await db.execute(text("UPDATE items SET name = :name"), {"name": name})

@app.put("/alone/{name}")
async def change_in_autocommit(name: str) -> None:
    async with overdrive.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(text(f"UPDATE items SET name = '{name}'"))
"""


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A directory with an app, and what it is to use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(_APP)
    monkeypatch.setenv("OVERDRIVE_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("OVERDRIVE_REDIS_URL", redis_url)
    monkeypatch.setenv("OVERDRIVE_CACHE__ENABLED", "true")
    with tables(sqlite_url) as engine:
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO items (id, name) VALUES (1, 'first'), (2, 'second')")
        yield


def made() -> Any:
    module: dict[str, Any] = {"__name__": "shop"}
    exec(_APP, module)
    return module["app"]


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Overdrive, Callable[..., Awaitable[Any]]]]:
    """The app, and how to ask it."""
    app = made()

    async def ask(method: str, address: str) -> Any:
        answer = await http.request(method, address)
        assert answer.status_code == 200
        return answer

    async with client(app) as http:
        try:
            yield overdrive_of(app), ask
        finally:
            await overdrive_of(app).aclose()


async def why() -> str:
    """What is said of the entry of /items/1, all of it in one piece."""
    # In a context of its own, as it leaves its request there.
    found = await asyncio.create_task(explain(made(), "GET", "/items/1", {"Host": "test"}))
    said = {versions["why"] for versions in found["tags"].values() if "why" in versions}
    assert "hush" not in str(found)
    return " | ".join(sorted(said))


_UPDATE = "UPDATE items SET name=? WHERE items.id = ?"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/items/1?name=hush", f"PUT /items/{{item_id}} ({_UPDATE})"),
        ("/plain/1?name=hush", f"PUT /plain/{{item_id}} ({_UPDATE})"),
        # The first statement that wrote; and no literal of any.
        ("/text/hush", "PUT /text/{name} (INSERT INTO items (name) VALUES (?))"),
        # Each commit has its own.
        ("/twice/hush", "PUT /twice/{name} (UPDATE items SET name = ?)"),
        ("/alone/hush", "PUT /alone/{name} (UPDATE items SET name = ?)"),
    ],
)
async def test_a_request_that_writes_is_named(address: str, expected: str) -> None:
    async with serving() as (_overdrive, ask):
        await ask("GET", "/items/1")
        assert await why() == ""
        await ask("PUT", address)
        said = await why()
        assert re.fullmatch(re.escape(f"outdated by {expected}, ") + r"\d+\.\d s ago", said)
        assert said.endswith(" s ago")
        # What is made anew is not outdated, and the next write is another one.
        assert (await ask("GET", "/items/1")).headers["x-cache"] == "miss"
        assert await why() == ""


async def test_other_writers_are_named() -> None:
    async with serving() as (overdrive, ask):

        async def outdated(write: Callable[[], Awaitable[Any]]) -> str:
            await ask("GET", "/items/1")
            assert await why() == ""
            await write()
            return (await why()).rpartition(",")[0]

        async def script() -> None:
            async with overdrive.engine.begin() as connection:
                await connection.exec_driver_sql("UPDATE items SET name = 'hush' WHERE id = 1")

        sql = "UPDATE items SET name = ? WHERE id = ?"
        assert await outdated(script) == f"outdated by a write outside of a request ({sql})"
        assert await outdated(lambda: overdrive.cache.invalidate("items")) == "outdated by invalidate()"
        invalidator = overdrive.cache.invalidator
        assert await outdated(lambda: invalidator.announce(["default/*"], "triggers")) == "outdated by triggers"
        # Of two the last one is told for each tag, and none that did not write it.
        await ask("GET", "/items/1")
        await overdrive.cache.invalidate("items")
        await ask("PUT", "/plain/1?name=hush")
        await ask("PUT", "/items/1?name=hushed")
        await overdrive.cache.invalidate("others")
        await ask("PUT", "/items/2?name=hush")
        of_row, of_table = (await why()).split(" | ")
        assert of_table.startswith("outdated by invalidate()")
        assert of_row.startswith("outdated by PUT /items/{item_id} (")


async def test_what_is_no_longer_remembered(redis_url: str) -> None:
    async with serving() as (overdrive, ask), Redis.from_url(redis_url) as server:
        await ask("GET", "/items/1")
        await ask("PUT", "/items/1?name=x")
        for _ in range(1_000):
            await overdrive.cache.store.bump(["default/others"], "somebody else")
        assert await server.llen("overdrive:writers") == 1_000
        assert await why() == "outdated by a write that is no longer remembered"
        # A stamp that was evicted is nobody's write, whatever has that number.
        await ask("GET", "/items/1")
        await overdrive.cache.store.bump(["default/others"], "somebody else")
        await server.delete(*[name async for name in server.scan_iter("overdrive:tag:default/items*")])
        assert await why() == "outdated by a write that is no longer remembered"


async def test_one_commit_is_remembered_once(redis_url: str) -> None:
    async with serving() as (overdrive, ask):
        await ask("PUT", "/items/1?name=x")
        (written,) = await overdrive.cache.store.history()
        assert (written.writer, written.instant.now) == (f"PUT /items/{{item_id}} ({_UPDATE})", 1)
        assert "default/items" in written.tags


async def test_no_write_fails_for_want_of_memory_of_it(redis_url: str) -> None:
    async with serving() as (overdrive, ask), Redis.from_url(redis_url) as server:
        await server.set("overdrive:writers", "of somebody else")
        await ask("GET", "/items/1")
        async with asyncio.timeout(10):
            await ask("PUT", "/items/1?name=x")
        assert not overdrive.cache.invalidator.owes
        assert (await ask("GET", "/items/1")).json() == "x"


async def test_the_command_tells_it() -> None:
    async with serving() as (_overdrive, ask):
        await ask("GET", "/items/1")
        await ask("PUT", "/items/1?name=hush")
        lines, document = [await anyio.to_thread.run_sync(_explained, *options) for options in ((), ("--json",))]
        assert f" now; outdated by PUT /items/{{item_id}} ({_UPDATE}), " in lines
        assert "hush" not in lines
        tags = json.loads(document)["tags"].values()
        assert any(each.get("why", "").startswith("outdated by PUT") for each in tags)


def _explained(*options: str) -> str:
    request = "GET", "/items/1", "--header", "Host: test"
    done = subprocess.run(
        [sys.executable, "-m", "overdrive.cli", "explain", "shop:app", *request, *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Deaf:
    """A store that hears nothing, for a time."""

    def __init__(self, store: Store) -> None:
        self.is_deaf = True
        self._store = store

    def __getattr__(self, name: str) -> Any:
        if self.is_deaf and name in ("mark", "bump"):
            raise StoreUnavailable("deaf")
        return getattr(self._store, name)


async def test_what_was_announced_late_has_its_writers() -> None:
    async with serving() as (overdrive, _ask):
        store = Deaf(overdrive.cache.store)
        invalidator = Invalidator(store)  # type: ignore[arg-type]
        for sql in "INSERT", "UPDATE":
            write = await invalidator.before(frozenset((f"default/{sql}",)), sql)
            store.is_deaf = sql == "INSERT"
            await invalidator.after(write, Outcome.COMMITTED)
        (written,) = await overdrive.cache.store.history()
        assert written.writer == "a write outside of a request (INSERT) or a write outside of a request (UPDATE)"
        invalidator.close()


async def test_a_cluster_remembers_too(cluster: RedisCluster) -> None:
    store = store_at(cluster.url, "test")
    await store.bump(["default/items"], "invalidate()")
    (written,) = await store.history()
    assert (written.tags, written.writer) == ({"default/items"}, "invalidate()")
    await store.aclose()


# Without Redis


def written(now: int, *tags: str, writer: str = "w", epoch: str = "e") -> Written:
    return Written(Instant(epoch, now), frozenset(tags), writer, float(now))


SINCE = Instant("e", 5)


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([], "no longer remembered"),
        ([written(9, "b"), written(7, "a", "b"), written(6, "a", writer="older")], "by w, 7.0 s ago"),
        ([written(5, "a")], "no longer remembered"),
        ([written(11, "a")], "no longer remembered"),
        ([written(7, "a", epoch="another")], "no longer remembered"),
        ([written(7, "a", writer="")], "by an unnamed write, 7.0 s ago"),
    ],
)
def test_the_last_write_of_a_tag(history: list[Written], said: str) -> None:
    assert said in outdated_by("a", SINCE, 10, history)


def test_names_of_writers() -> None:
    assert of_request("POST", "/users/{user_id}") == "POST /users/{user_id}"
    assert of_request("POST", None) == "POST of an unknown route"


@given(st.lists(st.sampled_from("abcdef")))
def test_writes_announced_as_one(writers: list[str]) -> None:
    named = together(writers).split(" or ")
    assert len(named) <= 4
    assert [each for each in named if len(each) == 1] == list(dict.fromkeys(writers))[:3]
    assert ("another write" in named) == (len(set(writers)) > 3)
