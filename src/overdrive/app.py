"""`Overdrive(app)`: the wiring of the parts, and their life."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request
from sqlalchemy import URL, Engine, NullPool, QueuePool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from .admission.gate import Admission
from .cache.alone import LoneStore
from .cache.cache import Cache
from .cache.store import Store, bytes_of_process
from .config import CacheSettings, Settings
from .errors import ConfigurationError
from .health import Readiness
from .installer import Installation
from .log.handler import LogHandler
from .log.logger import BindingLogger
from .metrics import Exporter, Reading, instrument, of_cache, of_log, of_pages, of_pool, of_source
from .pool.engine import capacity_of, create_engine, create_sync_engine, password_of, prepare
from .pool.listener import Listener
from .pool.observe import Observation, observe
from .pool.pool import FairPool
from .pool.session import Sessions, SyncSessions

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider


class Overdrive:
    """The performance layer of one FastAPI app.

    app: the app; its routes may come later, its first request not earlier.
    settings: everything that can be set; left out, the `OVERDRIVE_*` variables are read.
    database_url, redis_url: shorthands for the two settings.
    engine: a team's own async engine, instead of one made for `database_url`.
    sessionmaker: a team's own `async_sessionmaker`, whose engine is used.
    sync_engine: the same database for plain functions; left out, one is made when it is first asked for.
    session_class: of the sessions, where no `sessionmaker` is given (SQLModel's, say).
    engines: further engines by name, for `RequestSession("name")`.
    cache: False switches the cache off, True on even under pytest.
    tenant: says whose data a request is about, where the app has several tenants: their name, or None where that is
        nobody's. A cached response, a value and a cursor are good for their tenant alone; without one nothing is kept.
        It is called inside the app's own middlewares, so that it may read what these have found out.
    events_to: a logger of structlog or loguru, which gets each request's event instead of `overdrive.request`.

    Raises `ConfigurationError` for a setting that cannot work. Nothing is connected before it is used.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        settings: Settings | None = None,
        database_url: str | None = None,
        redis_url: str | None = None,
        engine: AsyncEngine | None = None,
        sessionmaker: async_sessionmaker[AsyncSession] | None = None,
        sync_engine: Engine | None = None,
        session_class: type[AsyncSession] = AsyncSession,
        engines: Mapping[str, AsyncEngine] | None = None,
        cache: bool | None = None,
        tenant: Callable[[Request], str | None] | None = None,
        events_to: BindingLogger | None = None,
    ) -> None:
        if events_to is not None and not hasattr(events_to, "bind"):
            raise ConfigurationError(
                "events_to= takes a logger of structlog or loguru, which has bind(); the standard library's "
                "loggers get their events from the logger overdrive.request"
            )
        if tenant is not None and (not callable(tenant) or inspect.iscoroutinefunction(tenant)):
            raise ConfigurationError(
                "tenant= takes a plain function from the request to a name: what has to be awaited is found out by a "
                "middleware, which leaves it in request.state"
            )
        _check("settings", settings, Settings, "Settings.load(...) makes one")
        _check("engine", engine, AsyncEngine, "an Engine is sync_engine=, beside a database_url= for the others")
        _check("sessionmaker", sessionmaker, async_sessionmaker, "plain functions have sessions of sync_engine=")
        _check("sync_engine", sync_engine, Engine, "an AsyncEngine is engine=")
        _check("engines", engines, Mapping, "engines by their names")
        for name, each in (engines or {}).items():
            _check(f"engines[{name!r}]", each, AsyncEngine, "create_async_engine() makes one")
        if not issubclass(session_class, AsyncSession):
            raise ConfigurationError(f"session_class= takes a class derived from AsyncSession, not {session_class!r}")
        self.events_to = events_to
        self.tenant = tenant
        self.settings = _settings(settings, database_url=database_url, redis_url=redis_url)
        self.admission = Admission(self.settings.admission.max_wait)
        #: Further parts whose numbers are exported: by their names, or of several things by the name of each.
        self.sources: dict[str, Callable[[], Mapping[str, Any]]] = {"admission": self.admission.statistics}
        self._exporter: Exporter | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._observations: list[Observation] = []

        if sessionmaker is not None and engine is None:
            engine = sessionmaker.kw.get("bind")
            if engine is None:
                raise ConfigurationError("this sessionmaker is bound to no engine: give the one it uses as engine=")
        self._owned: list[AsyncEngine] = []
        if engine is None:
            engine = create_engine(self.settings.database_url, **self._pooling)
            self._owned.append(engine)
        self.engine = engine
        self.engines: dict[str, AsyncEngine] = {"default": engine, **(engines or {})}
        databases = [each.url for each in self.engines.values()]
        if sync_engine is not None:
            databases.append(sync_engine.url)
        self.cache = _cache(self.settings, cache, databases)
        self.cache.invalidator.namesakes = _namesakes(self.engines)
        for name, each in self.engines.items():
            self._observe(each.sync_engine, name, prepared=each in self._owned)
        self._sessions = {name: Sessions.of(each, session_class) for name, each in self.engines.items()}
        if sessionmaker is not None:
            self._sessions["default"] = Sessions(sessionmaker)

        self._sync_session_class: type[Session] = session_class.sync_session_class
        self._sync_sessions: dict[str, SyncSessions] = {}
        self._owned_sync: list[Engine] = []
        if sync_engine is not None:
            self._observe(sync_engine, "default")
            self._sync_sessions["default"] = SyncSessions.of(sync_engine, self._sync_session_class)

        self._listeners = self._listening() if self.settings.cache.listen else ()
        self.cache.invalidator.listeners = self._listeners

        self.readiness = Readiness(self.engine, self.settings.admission)
        self.installation = Installation.of(app)
        self.installation.serve(self)

    @property
    def _pooling(self) -> dict[str, Any]:
        pool = self.settings.pool
        return {
            "pool_size": pool.size,
            "max_overflow": pool.max_overflow,
            "pool_timeout": pool.timeout,
            "pool_recycle": pool.recycle,
            "max_waiting": pool.max_waiting,
            "linger": pool.linger,
            "validate_after": pool.validate_after,
            "leak_after": pool.leak_after,
            "min_idle": pool.min_idle,
            "pgbouncer": pool.pgbouncer,
            "processes": pool.processes,
            "strict": pool.strict,
        }

    def _observe(self, engine: Engine, name: str, *, prepared: bool = False) -> None:
        if not prepared:
            prepare(engine)
        observation = observe(engine, name, self.cache.invalidator)
        if self.loop is not None:
            # It is made while the app serves, so `enter_loop` was too early for it.
            observation.loop = self.loop
        pool, capacity = engine.pool, capacity_of(engine.pool)
        if self.settings.admission.enabled and capacity is not None and isinstance(pool, FairPool | QueuePool):
            observation.admission = self.admission.gate(name, pool.size(), capacity)
        self._observations.append(observation)

    def _listening(self) -> tuple[Listener, ...]:
        """Return who listens to each PostgreSQL database; where nobody would, the default engine's refusal says why."""
        settings = self.settings
        shared_by = settings.redis_url and f"{settings.redis_url} {settings.cache.prefix}"
        reached = {name: each for name, each in self.engines.items() if each.dialect.name == "postgresql"}
        if settings.cache.direct_url is not None:
            reached["default"] = create_engine(settings.cache.direct_url, poolclass=NullPool)
        return tuple(
            Listener(engine, name, self.cache.invalidator, self.cache.clear, shared_by)
            for name, engine in (reached or self.engines).items()
        )

    # Sessions

    def sessions(self, engine: str = "default") -> Sessions:
        """Return what makes the async sessions of an engine; raises `ConfigurationError` for an unknown name."""
        self._known(engine)
        return self._sessions[engine]

    def sync_sessions(self, engine: str = "default") -> SyncSessions:
        """Return what makes the synchronous sessions of an engine, with a pool of their own."""
        if engine not in self._sync_sessions:
            sync_engine = self._known(engine).sync_engine
            url = sync_engine.url
            if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
                raise ConfigurationError(
                    "an SQLite database in memory belongs to one connection, and plain functions need another: "
                    "use a file, sqlite:///file.sqlite"
                )
            made = create_sync_engine(url, password=password_of(sync_engine), **self._pooling)
            self._owned_sync.append(made)
            self._observe(made, engine, prepared=True)
            self._sync_sessions[engine] = SyncSessions.of(made, self._sync_session_class)
        return self._sync_sessions[engine]

    def session(self, engine: str = "default") -> contextlib.AbstractAsyncContextManager[AsyncSession]:
        """Open a session where there is no request: committed at the end of the block, rolled back if it raises."""
        return self.sessions(engine)()

    def sync_session(self, engine: str = "default") -> contextlib.AbstractContextManager[Session]:
        """Open a synchronous session where there is no request; see `session`."""
        return self.sync_sessions(engine)()

    def _known(self, engine: str) -> AsyncEngine:
        if engine not in self.engines:
            raise ConfigurationError(
                f"there is no engine {engine!r}: Overdrive(engines={{{engine!r}: ...}}); known are "
                + ", ".join(self.engines)
            )
        return self.engines[engine]

    # Life

    def layers(self) -> list[str]:
        """Name what a request passes, from the outermost to the router."""
        return self.installation.layers()

    def enter_loop(self) -> None:
        """Serve in the running loop; connections of one that has closed (a test's) are left behind with it."""
        loop = asyncio.get_running_loop()
        if loop is self.loop and not self._is_closed:
            return
        self._is_closed = False
        if self.loop is not None and self.loop.is_closed():
            for engine in self.engines.values():
                engine.sync_engine.dispose(close=False)
            self.admission.reset()
        self.loop = loop
        for observation in self._observations:
            observation.loop = loop
        for listener in self._listeners:
            listener.start()
        for handler in _log_handlers():
            handler.reopen()
        if self._exporter is not None:
            self._exporter.keep_writing()

    async def aclose(self) -> None:
        """Close what Overdrive has opened, and write what is logged from now on at once; the app may start up again."""
        self._is_closed = True
        await self.cache.refreshes.aclose()
        for listener in self._listeners:
            await listener.aclose()
        for engine in self._owned:
            await engine.dispose()
        for sync_engine in self._owned_sync:
            await anyio.to_thread.run_sync(sync_engine.dispose)
        await self.cache.aclose()
        for handler in _log_handlers():
            await anyio.to_thread.run_sync(handler.close)
        if self._exporter is not None:
            self._exporter.close()

    # Numbers

    def metrics_router(self) -> APIRouter:
        """Return a router that answers `GET /metrics` for Prometheus, of all workers of this server.

        What others have counted in the last second may be missing. It is the app's to keep strangers away from it:
        `app.include_router(overdrive.metrics_router(), dependencies=[...])`.
        """
        if self._exporter is None:
            self._exporter = Exporter(self._numbers)
        return self._exporter.router()

    def instrument(self, meter_provider: MeterProvider | None = None) -> None:
        """Have OpenTelemetry read the numbers of this process, by the same names.

        meter_provider: left out, the global one.
        """
        instrument(self._numbers, meter_provider)

    def _numbers(self) -> Iterator[Reading]:
        for name, engine in self.engines.items():
            yield from of_pool(name, engine.sync_engine.pool)
        for name, sync in self._sync_sessions.items():
            yield from of_pool(f"{name}-sync", sync.engine.pool)
        yield from of_cache(self.cache)
        yield from of_pages()
        yield from of_log(_log_handlers())
        for name, read in self.sources.items():
            yield from of_source(name, read())


def add_pagination(app: FastAPI) -> FastAPI:
    """Read page parameters on every route of `app` that declares a page, without the rest of Overdrive.

    With `Overdrive(app)` it is not needed, and does no harm.
    """
    Installation.of(app)
    return app


def _check(name: str, value: object, kind: type, hint: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name}= takes {kind.__name__}, not {type(value).__name__}: {hint}")


def _settings(settings: Settings | None, **given: str | None) -> Settings:
    values = {name: value for name, value in given.items() if value is not None}
    if settings is None:
        return Settings.load(**values)
    if values:
        raise ConfigurationError(f"give {' and '.join(values)} either in settings= or as an argument")
    return settings


def _cache(settings: Settings, enabled: bool | None, databases: Iterable[URL]) -> Cache:
    options: CacheSettings = settings.cache
    strict = options.consistency == "strict"
    store: Store
    if settings.redis_url is None:
        store = LoneStore(options.max_bytes, filter(None, map(_name_of_database, databases)))
    else:
        from .cache.cluster import store_at

        near = 0 if strict else bytes_of_process(options.max_bytes)
        store = store_at(settings.redis_url, options.prefix, near)
    if enabled is None:
        enabled = options.enabled
    if enabled is None:
        # A test that does not ask for the cache should not meet another test's responses.
        enabled = "PYTEST_VERSION" not in os.environ
    return Cache(store, enabled=enabled, ttl=options.ttl, max_body=options.max_body, strict=strict)


def _name_of_database(url: URL) -> str | None:
    """Return what all who use a database know it by, whatever their driver and role; None where it is one's own."""
    if url.get_backend_name() != "sqlite":
        at = [url.query.get(name, own) for name, own in (("host", url.host), ("port", url.port))]
        return f"{url.get_backend_name()} {at} {url.database}"
    if url.database in (None, "", ":memory:"):
        return None
    return f"sqlite {os.path.realpath(url.database)}"


def _namesakes(engines: Mapping[str, AsyncEngine]) -> dict[str, list[str]]:
    """Return of each engine's name the others whose engines use the same database."""
    databases = {name: _name_of_database(each.url) for name, each in engines.items()}
    return {
        name: others
        for name, own in databases.items()
        if own is not None and (others := [other for other in databases if other != name and databases[other] == own])
    }


def _log_handlers() -> Iterator[LogHandler]:
    named = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
    for logger in (logging.root, *named):
        for handler in logger.handlers:
            if isinstance(handler, LogHandler):
                yield handler
