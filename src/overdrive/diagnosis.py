"""`overdrive doctor`, second chapter: how an app is set up, and what of it will hurt.

Nothing is changed and no route is called; the database and Redis are asked for their limits.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIWebSocketRoute
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .app import Overdrive
from .cache.store import StoreUnavailable
from .caching import key_plan
from .endpoint import CACHED
from .errors import ConfigurationError
from .inspection import treatment, verdict
from .installer import Installation, installed_on
from .pages import PROCESS_KEY
from .pool.explain import on_connection
from .pool.pool import FairPool
from .routes import Site, page_model, sites
from .workers import workers

_OURS = ("Observer", "RequestPath")


@dataclass(frozen=True, slots=True)
class Setup:
    """How an app is set up.

    layers: what a request passes, from the outermost to the router.
    routes: what each gets: its session, its page, its cache.
    sizes: what pools may come to, and what their databases allow.
    findings: what is wrong, each with its cure.
    """

    layers: list[str]
    routes: dict[str, list[str]]
    sizes: list[str]
    findings: list[str]

    def as_text(self) -> str:
        """Return what there is, and after it a line for each finding."""
        width = max(map(len, self.routes), default=0)
        lines = ["layers  " + " > ".join(f"overdrive.{each}" if each in _OURS else each for each in self.layers)]
        lines += [f"route   {name:<{width}}  {'; '.join(gets) or '-'}" for name, gets in self.routes.items()]
        lines += [f"pool    {size}" for size in self.sizes]
        lines += [f"wrong   {finding}" for finding in self.findings]
        return "\n".join(lines)


async def set_up(app: FastAPI) -> Setup:
    """Look at how an app is set up, before anything of it is installed or runs.

    Raises `ConfigurationError` for an app that has neither `Overdrive(app)` nor `add_pagination(app)`.
    """
    installation = installed_on(app)
    every, overdrive = list(sites(app)), installation.runtime
    sizes, findings = list[str](), list[str]()
    if overdrive is not None:
        async for size, wrong in _sizes(overdrive):
            sizes.append(size)
            findings += wrong
        findings += [each async for each in _of_redis(overdrive)]
    findings += _of_workers(installation, every)
    findings += _of_routes(every)
    if overdrive is not None:
        findings += _of_own_sessions(every)
    findings += _of_loggers()
    return Setup(installation.layers(), {site.name: _gets(site) for site in every}, sizes, findings)


# Routes


def _gets(site: Site) -> list[str]:
    said = _verdict(site)
    return [*treatment(site), *([] if said is None else [said])]


def _verdict(site: Site) -> str | None:
    mark = getattr(site.route.endpoint, CACHED, None)
    if mark is None or isinstance(site.route.original_route, APIWebSocketRoute):
        return None
    return verdict(site, mark, key_plan(site, mark, 0))


def _of_routes(every: Iterable[Site]) -> Iterator[str]:
    for site in every:
        if (said := _verdict(site)) is not None and said.startswith("not cached: "):
            yield f"{site.name} is marked @cached and is {said}"


_SESSIONS = (Session, AsyncSession)
_FACTORIES = (sessionmaker, async_sessionmaker, scoped_session, async_scoped_session)


def _of_own_sessions(every: Iterable[Site]) -> Iterator[str]:
    """Name dependencies that yield sessions of a team's own: these commit after the response has left."""
    routes: dict[Any, list[str]] = defaultdict(list)
    for site in every:
        for dependant in site.dependencies():
            call = site.resolved(dependant.call)
            yields = inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call)
            if yields and _makes_sessions(call) and site.name not in routes[call]:
                routes[call].append(site.name)
    for call, names in routes.items():
        if names:
            session = "get_session" if inspect.isasyncgenfunction(call) else "get_sync_session"
            yield (
                f"{call.__name__}() ends its sessions after the response was sent, on {_some(names)}: "
                f"app.dependency_overrides[{call.__name__}] = overdrive.{session}"
            )


def _makes_sessions(call: Any) -> bool:
    """Say whether a generator's code names what makes sessions."""
    named = (call.__globals__.get(name) for name in call.__code__.co_names)
    closed = inspect.getclosurevars(call).nonlocals.values()
    return any(
        isinstance(each, _FACTORIES) or (isinstance(each, type) and issubclass(each, _SESSIONS))
        for each in (*named, *closed)
    )


# Workers


def _of_workers(installation: Installation, every: Iterable[Site]) -> Iterator[str]:
    number = workers()
    if number == 1:
        return
    marked = [site.name for site in every if hasattr(site.route.endpoint, CACHED)]
    runtime = installation.runtime
    if marked and runtime is not None and runtime.settings.redis_url is None:
        yield (
            f"{number} workers (WEB_CONCURRENCY) without a Redis hear of no other's writes, so nothing that reads a "
            f"database is cached, on {_some(marked)}: OVERDRIVE_REDIS_URL=redis://..."
        )
    walked = [site.name for site in every if (model := page_model(site)) is not None and model.style == "cursor"]
    if walked and PROCESS_KEY in installation.cursor_keys:
        yield (
            f"{number} workers (WEB_CONCURRENCY) sign cursors with a key that ends with their server, on "
            f"{_some(walked)}: OVERDRIVE_PAGINATION__SECRETS=<32 random bytes, as text>"
        )


# Pools


async def _sizes(overdrive: Overdrive) -> AsyncIterator[tuple[str, list[str]]]:
    """Set what all workers' pools may come to against what PostgreSQL allows."""
    for name, engine in overdrive.engines.items():
        pool, number = engine.pool, workers()
        if not isinstance(pool, FairPool) or engine.dialect.name != "postgresql":
            continue
        wanted = number * pool.capacity
        size = f"{name}: {number} worker{'s' * (number > 1)} x {pool.capacity} connections = {wanted}"
        try:
            allowed, limit = await on_connection(engine.sync_engine, _allowed)
        except (SQLAlchemyError, OSError) as error:
            yield size, [f"the database of {name} cannot be asked for its limits: {_line(error)}"]
            continue
        finally:
            await engine.dispose()
        size = f"{size} of {allowed} (max_connections {limit}, {limit - allowed} reserved)"
        fits = max(1, allowed // number)
        cure = (
            f"the pools of {name} may want {wanted} connections of {allowed}: OVERDRIVE_POOL__SIZE and "
            f"OVERDRIVE_POOL__MAX_OVERFLOW together at most {fits}, or a max_connections of "
            f"{wanted + limit - allowed}"
        )
        yield size, [cure] if wanted > allowed else []


def _allowed(connection: Connection) -> tuple[int, int]:
    """Return how many connections PostgreSQL leaves to everybody, and how many there may be in all."""
    names = ("max_connections", "superuser_reserved_connections", "reserved_connections")
    query = text("SELECT name, setting::int FROM pg_settings WHERE name = ANY(:names)")
    settings = {name: int(value) for name, value in connection.execute(query, {"names": list(names)})}
    limit = settings.pop("max_connections")
    return limit - sum(settings.values()), limit


# Redis


async def _of_redis(overdrive: Overdrive) -> AsyncIterator[str]:
    if overdrive.settings.redis_url is None:
        return
    store: Any = overdrive.cache.store
    try:
        said = await store.described()
    except (StoreUnavailable, OSError, ConfigurationError) as error:
        yield f"Redis cannot be asked: {_line(error)}"
        return
    finally:
        await store.aclose()
    for each in advice_on(said):
        yield each


def advice_on(said: dict[str, str]) -> Iterator[str]:
    """Return what is wrong with a Redis, by what it has said of itself.

    Entries have a time to live, and the clock and the tags have none: what evicts the latter is right, but forgetful.
    """
    version = said["redis_version"]
    if tuple(map(int, version.split(".")[:2])) < (6, 2):
        yield f"Redis {version} is older than 6.2: upgrade it"
    policy = said.get("maxmemory_policy", "noeviction")
    if policy == "noeviction" and said.get("maxmemory", "0") != "0":
        yield (
            "Redis keeps nothing new once its maxmemory is full, not even the news of a write, and the cache is left "
            "alone then: maxmemory-policy allkeys-lru"
        )
    elif policy.endswith("-random"):
        yield f"Redis evicts what is used all the time ({policy}): maxmemory-policy allkeys-lru"
    if (refusal := said["pushes"]) != "yes":
        yield (
            f"Redis may not tell of writes, so every hit asks it instead of being in the process ({refusal}): allow "
            "its user HELLO, SUBSCRIBE and the channel &<cache.prefix>:*"
        )


# Loggers


def _of_loggers() -> Iterator[str]:
    every = {name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    if disabled := sorted(name for name, each in every.items() if each.disabled):
        yield (
            f"the loggers {_some(disabled)} are disabled, as logging.config does with those it does not name: "
            "disable_existing_loggers=False"
        )
    for name, logger in every.items():
        if not logger.handlers or not logger.propagate:
            continue
        own, parent = {_place(each) for each in logger.handlers}, logger.parent
        while parent is not None:
            if doubled := own & {_place(each) for each in parent.handlers} - {None}:
                yield (
                    f"what {name} logs is written to {doubled.pop()} twice, by a handler of its own and by one of "
                    f"{parent.name}: logging.getLogger({name!r}).propagate = False"
                )
                break
            parent = parent.parent if parent.propagate else None


def _place(handler: logging.Handler) -> str | None:
    """Return where a handler writes; None where nobody can tell."""
    if (path := getattr(handler, "baseFilename", None)) is not None:
        return str(path)
    console = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return "the console" if any(getattr(handler, "stream", None) is each for each in console if each) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _line(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
