"""Several workers on one database and one Redis, whose requests are taken forward a step at a time.

Each worker is an app with a store, a connection to Redis and an engine of its own. A request stops at each gate: before
and after what its endpoint does, at each question to the store, and around its COMMIT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import httpx2
from fastapi import FastAPI, HTTPException
from fastapi.encoders import jsonable_encoder
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from pool.actions import READS, WRITES, Base, User, filled, reads, writes
from pydantic import BaseModel
from redis import Redis
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError
from support import outside

from overdrive import Cache, Overdrive, Page, SessionDep, Settings, SyncSessionDep, cached, paginate
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import StoreUnavailable
from overdrive.config import CacheSettings, PaginationSettings
from overdrive.pool.observe import Outcome, observation_of

#: Where a request of the machine may be made to wait.
_GATED = ("load", "claim", "versions", "save", "bump", "mark", "settle")


class Run:
    """A request under way.

    stages: what it has passed, in their order.
    free: whether it stops nowhere any more.
    """

    def __init__(self, worker: Worker, what: tuple[Any, ...]) -> None:
        self.worker = worker
        self.what = what
        self.stages: list[str] = []
        self.free = False
        self._waiting: list[asyncio.Future[None]] = []
        self.task: asyncio.Task[httpx2.Response]

    @property
    def is_over(self) -> bool:
        return self.task.done()

    @property
    def is_committing(self) -> bool:
        """Say whether what it writes may be there already, while its answer is not."""
        return "before commit" in self.stages and not self.is_over

    async def gate(self, stage: str) -> None:
        self.stages.append(stage)
        if not self.free:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    async def settle(self) -> None:
        """Wait until it stands at a gate or is over, or waits for something else than the machine."""
        for _ in range(100):
            if self._waiting or self.task.done():
                return
            await asyncio.sleep(0.001)

    async def step(self) -> None:
        """Take it to its next gate."""
        if self._waiting and not (future := self._waiting.pop(0)).done():
            future.set_result(None)
        await self.settle()

    def release(self) -> None:
        """Stop nowhere any more."""
        self.free = True
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


_run: ContextVar[Run | None] = ContextVar("run", default=None)


async def gate(stage: str) -> None:
    """Stop here, if this belongs to a request of the machine."""
    if (run := _run.get()) is not None:
        await run.gate(stage)


class UserOut(BaseModel):
    id: int
    name: str


class Commits:
    """Stops a request before and after its COMMIT, inside of what the cache does there."""

    async def before(self, written: frozenset[str], sql: str) -> None:
        await gate("before commit")

    async def after(self, token: None, outcome: Outcome) -> None:
        await gate("after commit")


class Worker:
    """One process of a service, but for its process."""

    def __init__(self, url: str, redis_url: str | None, **cache: Any) -> None:
        self.app = FastAPI()
        settings = Settings.load(
            database_url=url,
            redis_url=redis_url,
            cache=CacheSettings(**cache),
            pagination=PaginationSettings(cache_totals=True),
        )
        self.overdrive = Overdrive(self.app, settings=settings, cache=True)
        self.store = self.overdrive.cache.store
        observation = observation_of(self.overdrive.engine.sync_engine)
        assert observation is not None
        observation.observers.append(Commits())
        for name in _GATED:
            if (method := getattr(self.store, name, None)) is not None and asyncio.iscoroutinefunction(method):
                setattr(self.store, name, _gated(name, method))
        add_routes(self.app, self.overdrive.cache)
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test")

    def start(self, method: str, path: str, what: tuple[Any, ...]) -> Run:
        run = Run(self, what)

        async def request() -> httpx2.Response:
            _run.set(run)
            return await self.http.request(method, path)

        run.task = asyncio.get_running_loop().create_task(request())
        return run

    async def hear(self) -> None:
        """Wait until all that Redis has told by now has been heard."""
        while isinstance(self.store, RedisStore):
            try:
                await self.store._link().ask("PING")
                break
            except StoreUnavailable:
                await asyncio.sleep(0.002)

    async def aclose(self) -> None:
        await self.http.aclose()
        await self.overdrive.aclose()


def _gated(name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def gated(*args: Any, **kwargs: Any) -> Any:
        await gate(name)
        return await method(*args, **kwargs)

    return gated


def add_routes(app: FastAPI, cache: Cache) -> None:
    @app.get("/read/{how}/{i}/{j}")
    @cached(ttl=3600)
    async def read(how: str, i: int, j: int, db: SessionDep) -> Any:
        await gate("before reading")
        result = await db.run_sync(reads(i, j)[how])
        await gate("after reading")
        return jsonable_encoder(result)

    @app.get("/sync/{how}/{i}/{j}")
    @cached(ttl=3600)
    def read_sync(how: str, i: int, j: int, db: SyncSessionDep) -> Any:
        return jsonable_encoder(reads(i, j)[how](db))

    @app.get("/value/{how}/{i}/{j}")
    async def value(how: str, i: int, j: int, db: SessionDep) -> Any:
        async def load() -> Any:
            await gate("before reading")
            return jsonable_encoder(await db.run_sync(reads(i, j)[how]))

        return await cache.get_or_set(f"{how} {i} {j}", load, ttl=3600)

    @app.get("/page/{how}/{i}/{j}", response_model=Page[UserOut])
    async def page(db: SessionDep) -> Any:
        return await paginate(db, select(User).order_by(User.id))

    @app.post("/sync/{how}/{i}/{j}/{name}")
    def write_sync(how: str, i: int, j: int, name: str, db: SyncSessionDep) -> None:
        try:
            writes(i, j, name)[how](db)
            db.flush()
        except (DBAPIError, StaleDataError) as error:
            raise HTTPException(409) from error

    @app.post("/{commits}/{how}/{i}/{j}/{name}")
    async def write(commits: Literal["write", "auto"], how: str, i: int, j: int, name: str, db: SessionDep) -> None:
        if commits == "auto":
            await db.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await gate("before writing")
        try:
            await db.run_sync(writes(i, j, name)[how])
            await db.flush()
        except (DBAPIError, StaleDataError) as error:
            # The row is not there, or there already; or somebody else has it.
            raise HTTPException(409) from error
        await gate("after writing")


class Database:
    """What is there, by an engine that Overdrive has never heard of."""

    def __init__(self, url: str) -> None:
        self.engine: Engine = outside(url)
        Base.metadata.drop_all(self.engine)
        Base.metadata.create_all(self.engine)

    def fill(self) -> None:
        with Session(self.engine) as session:
            filled(session)

    def read(self, path: str, how: str, i: int, j: int) -> Any:
        with Session(self.engine) as session:
            if path == "page":
                users = [{"id": user.id, "name": user.name} for user in session.scalars(select(User).order_by(User.id))]
                return {"items": users, "total": len(users), "page": 1, "size": 50, "pages": min(1, len(users))}
            return jsonable_encoder(reads(i, j)[how](session))

    def drop(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        Base.metadata.drop_all(self.engine)
        self.engine.dispose()


#: How it is read: as a response, by a plain function, as a value, and as a page with its total.
PATHS = ["read", "read", "sync", "value", "page"]
COMMITS = st.sampled_from(["write", "write", "auto"])
WORKERS = st.integers(0, 2)
IDS = st.integers(1, 3)
ANY = st.integers(0, 99)


class Workers(RuleBasedStateMachine):
    """Requests of three workers, each at any of its steps while others take theirs."""

    loop: asyncio.AbstractEventLoop
    database: Database
    workers: list[Worker]
    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []
        self.seen: set[tuple[str, int, int]] = set()
        self.names = 0

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        self.database.fill()
        self.redis.flushdb()
        # Nobody was told of what the database holds now.
        for worker in self.workers:
            self.do(worker.hear())
            self.do(worker.store.clear())

    # Requests

    @rule(worker=WORKERS, path=st.sampled_from(PATHS), how=st.sampled_from(READS), i=IDS, j=IDS)
    def read(self, worker: int, path: str, how: str, i: int, j: int) -> None:
        self.seen.add((how, i, j))
        self._start(worker, "GET", f"/{path}/{how}/{i}/{j}", (how, i, j))

    @rule(worker=WORKERS, commits=COMMITS, how=st.sampled_from(WRITES), i=IDS, j=IDS)
    def write(self, worker: int, commits: str, how: str, i: int, j: int) -> None:
        self.names += 1
        self._start(worker, "POST", f"/{commits}/{how}/{i}/{j}/new{self.names}", (how, i, j))

    def _start(self, worker: int, method: str, path: str, what: tuple[Any, ...]) -> None:
        async def start() -> None:
            run = self.workers[worker].start(method, path, (worker, method, *what))
            self.runs.append(run)
            await run.settle()

        self.do(start())

    @rule(which=ANY, steps=st.integers(1, 4))
    def step(self, which: int, steps: int) -> None:
        for run in self._one(which):
            for _ in range(steps):
                self.do(run.step())
        self._forget_what_is_over()

    @rule(which=ANY)
    def finish(self, which: int) -> None:
        for run in self._one(which):
            self.do(self._finished(run))
        self._forget_what_is_over()

    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        for run in self._one(which):
            run.task.cancel()
            self.do(self._finished(run))
        self._forget_what_is_over()

    def _one(self, which: int) -> list[Run]:
        """One of those under way, if there are any: what is drawn must not depend on how fast they are."""
        return [self.runs[which % len(self.runs)]] if self.runs else []

    async def _finished(self, run: Run) -> None:
        run.release()
        if not (await asyncio.wait([run.task], timeout=0.1))[0]:
            # It waits for one of the others: for a row's lock, say.
            await self._all_finished()

    async def _all_finished(self) -> None:
        for run in self.runs:
            run.release()
        if self.runs:
            _, hanging = await asyncio.wait([run.task for run in self.runs], timeout=30)
            assert not hanging, [(run.what, run.stages) for run in self.runs if not run.is_over]

    def _forget_what_is_over(self) -> None:
        self.runs = [run for run in self.runs if not run.is_over]

    # What is asked for, whatever is under way

    @rule(worker=WORKERS, path=st.sampled_from(PATHS), how=st.sampled_from(READS), i=IDS, j=IDS)
    def look(self, worker: int, path: str, how: str, i: int, j: int) -> None:
        if not any(run.is_committing for run in self.runs):
            self._check(worker, path, how, i, j)

    @rule(worker=WORKERS, which=ANY)
    def look_again(self, worker: int, which: int) -> None:
        if self.seen and not any(run.is_committing for run in self.runs):
            self._check(worker, "read", *sorted(self.seen)[which % len(self.seen)])

    def _check(self, worker: int, path: str, how: str, i: int, j: int) -> None:
        self.seen.add((how, i, j))
        before = self.database.read(path, how, i, j)

        async def answered() -> Any:
            await self.workers[worker].hear()
            return await self.workers[worker].http.get(f"/{path}/{how}/{i}/{j}")

        response = self.do(answered())
        assert response.status_code == 200, response.text
        # The COMMIT of a request that was cancelled goes on behind it.
        expected = before, self.database.read(path, how, i, j)
        assert response.json() in expected, (worker, path, how, i, j, response.headers.get("cache-status"))

    # What happens to Redis

    @rule()
    def flush(self) -> None:
        self.redis.flushdb()

    @rule(which=ANY)
    def evict(self, which: int) -> None:
        if keys := sorted(self.redis.keys("*")):
            self.redis.delete(keys[which % len(keys)])

    @rule()
    def cut_off(self) -> None:
        self.redis.client_kill_filter(_type="normal", skipme=True)
        self.redis.client_kill_filter(_type="pubsub", skipme=True)

    def teardown(self) -> None:
        self.do(self._all_finished())
        for how, i, j in sorted(self.seen):
            for worker in range(3):
                self._check(worker, "read", how, i, j)


@contextmanager
def workers(url: str, redis_url: str, **cache: Any) -> Iterator[type[Workers]]:
    """A machine with workers of its own."""
    runner = asyncio.Runner()
    loop = runner.get_loop()
    asyncio.set_event_loop(loop)
    database = Database(url)
    made: list[Worker] = []

    async def make() -> None:
        made.extend(Worker(url, redis_url, prefix="machine", **cache) for _ in range(3))

    runner.run(make())
    try:
        with Redis.from_url(redis_url) as redis:
            yield type("Workers", (Workers,), {"loop": loop, "database": database, "workers": made, "redis": redis})
    finally:
        for worker in made:
            runner.run(worker.aclose())
        runner.close()
        database.drop()


def run(machine: type[Workers], examples: int) -> None:
    """Try so many sequences of steps."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
