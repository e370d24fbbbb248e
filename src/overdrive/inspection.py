"""`overdrive inspect` and `overdrive explain`: what becomes of an app's routes, and of one request, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

from fastapi import FastAPI
from fastapi.routing import APIWebSocketRoute
from starlette.routing import compile_path

from .app import Overdrive
from .cache.entry import Entry, Instant, State
from .cache.exchange import Exchange
from .cache.history import outdated_by
from .cache.key import KeyPlan
from .cache.policy import may_be_stale
from .cache.store import PENDING, MemoryStore, StoreUnavailable
from .cache.trust import hits, is_off, requests
from .caching import identities, key_plan
from .context import current
from .doctor import scope_of, started, told
from .endpoint import CACHED, Mark, RequestSession, SessionFactory, SyncRequestSession, SyncSessionFactory
from .errors import ConfigurationError
from .installer import Installation, refuse_misuse, trust_of
from .pool.explain import read_only
from .routes import Site, is_awaited, page_model, page_style, sites

_PAGES = {"page": "page by number", "limit_offset": "page by limit and offset", "cursor": "page by cursor"}

_SESSIONS: dict[type, str] = {
    RequestSession: "async session",
    SyncRequestSession: "sync session",
    SessionFactory: "async session factory",
    SyncSessionFactory: "sync session factory",
}

#: Where counts are without a Redis, and why an entry of a server's is not found.
_IN_EACH_PROCESS = (
    "each worker counts for itself: see overdrive.cache.statistics() there, or share a Redis (OVERDRIVE_REDIS_URL)"
)
_OWN_MEMORY = "entries are in each worker's memory, and this is another process: with a Redis they could be seen"


def overdrive_of(app: FastAPI) -> Overdrive:
    """Return what serves an app; raises `ConfigurationError` where nothing does."""
    installation: Installation | None = getattr(app.state, "overdrive_installation", None)
    if installation is None or installation.runtime is None:
        raise ConfigurationError("the app has no Overdrive: call Overdrive(app)")
    return installation.runtime


# Routes


@dataclass(frozen=True, slots=True)
class CachedRoute:
    """A route that is marked `@cached`.

    verdict: whose its responses are, or why they are not kept.
    key: what tells one response from another.
    ttl: seconds.
    counts: of its requests, where they are known.
    """

    mode: str
    verdict: str
    key: list[str]
    ttl: float
    counts: Mapping[str, int] | None

    @property
    def hit_ratio(self) -> float | None:
        """Return the share of requests that were hits; None where there was no request, or nobody knows."""
        return hits(self.counts) / count if self.counts and (count := requests(self.counts)) else None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What becomes of an app's routes.

    routes: what each gets but for the cache, by name.
    off: what is switched off.
    note: what is not known, and where it is.
    """

    layers: list[str]
    routes: dict[str, list[str]]
    cached: dict[str, CachedRoute]
    off: list[str]
    note: str | None


async def inspected(overdrive: Overdrive) -> Inspection:
    """Look at every route of an app; raises `ConfigurationError` for one that the app would refuse to serve."""
    store, sums, note = overdrive.cache.store, None, None
    try:
        sums, off = await store.sums(), await store.switched_off()
    except StoreUnavailable as error:
        off, note = frozenset(), f"the cache's store does not answer: {error}"
    finally:
        await store.aclose()
    layers, routes, cached = overdrive.layers(), {}, {}
    for site in sites(overdrive.installation.app):
        routes[site.name] = list(treatment(site))
        mark = getattr(site.route.endpoint, CACHED, None)
        if mark is not None and not isinstance(site.route.original_route, APIWebSocketRoute):
            counts = None if sums is None else sums.get(site.name, {})
            cached[site.name] = _cached(site, mark, overdrive, off, counts)
    if sums is None and cached:
        note = note or _IN_EACH_PROCESS
    return Inspection(layers, routes, cached, sorted(off), note)


def treatment(site: Site) -> Iterator[str]:
    """Name the page and the sessions a route gets."""
    refuse_misuse(site)
    # A websocket has no pages.
    if not isinstance(site.route.original_route, APIWebSocketRoute) and (style := page_style(site)) is not None:
        yield _PAGES[style]
    calls = {type(site.resolved(dependant.call)) for dependant in site.graph()}
    yield from (name for kind, name in _SESSIONS.items() if kind in calls)


def _cached(
    site: Site, mark: Mark, overdrive: Overdrive, off: frozenset[str], counts: Mapping[str, int] | None
) -> CachedRoute:
    ttl = mark.ttl or overdrive.cache.ttl
    plan = key_plan(site, mark, ttl)
    return CachedRoute(
        _mode(site, mark, overdrive, off, enabled=overdrive.cache.enabled),
        verdict(site, mark, plan),
        [] if isinstance(plan, str) else _inputs(site, mark, plan, overdrive),
        ttl,
        counts,
    )


def _mode(site: Site, mark: Mark, overdrive: Overdrive, off: frozenset[str], *, enabled: bool) -> str:
    trust = trust_of(site, mark, overdrive.settings.cache)
    if not enabled:
        return "off: the cache is (cache.enabled)"
    if is_off(off, site.template):
        return "off: switched"
    return f"{trust.mode}, verify {trust.verify:.3g}" if trust.verify else trust.mode


def verdict(site: Site, mark: Mark, plan: KeyPlan | str) -> str:
    """Say whose a cached route's responses are, or why they are not kept."""
    if isinstance(plan, str):
        return f"not cached: {plan}"
    # Whoever reads this ought to know that it is not always what the database has.
    behind = f"; up to {max(mark.stale_while_revalidate, mark.stale_if_error):g} s outdated" if mark.outdated else ""
    if mark.public:
        return f"public: the same for everybody{behind}"
    return f"private: per {', '.join(identities(site, mark))}{behind}" if plan.private else f"cached{behind}"


def _inputs(site: Site, mark: Mark, plan: KeyPlan, overdrive: Overdrive) -> list[str]:
    names = ["host", "path"]
    # A page puts the whole address into its links and cursors.
    if plan.parameters is None or page_model(site) is not None:
        names.append("every query parameter")
    else:
        names += [f"query {name}" for name in sorted(plan.parameters)]
    # Some servers have underscores for hyphens, so that both are looked at.
    headers = [name for name in plan.headers if "_" not in name]
    names += [f"header {name}" for name in headers] + [f"cookie {name}" for name in plan.cookies]
    names += [name for name in identities(site, mark) if name.endswith("()")]
    return [*names, "tenant"] if overdrive.tenant is not None else names


# One request


async def explain(app: FastAPI, method: str, address: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Say what becomes of a request in the cache: findings by their names, in the order in which they are made.

    The request is sent into the app in this process: its lifespan, middlewares and dependencies run, while databases
    refuse writes; the endpoint does not. Of headers, cookies and query parameters only the names are told.

    address: path and query.
    headers: of the request; the host is part of the key, and `localhost` where none is given.

    Raises `ConfigurationError` where the app does not start, and for what is no request.
    """
    if not method.isalpha() or not address.startswith("/"):
        raise ConfigurationError(f"{method} {address} is no request: it looks like GET /users/42?size=10")
    overdrive, method = overdrive_of(app), method.upper()
    enabled = overdrive.cache.enabled
    async with read_only(), started(app, overdrive.installation) as state:
        reached = _Reached(app)
        status = await _send(app, _scope(method, address, headers, state), reached)
        findings: dict[str, Any] = {"request": f"{method} {address.partition('?')[0]}"}
        if reached.site is None:
            return findings | {"verdict": _unreached(app, method, address, status)}
        try:
            return findings | await _explained(reached.site, reached.exchange, overdrive, method, enabled)
        except StoreUnavailable as error:
            return findings | {"route": reached.site.name, "verdict": f"the cache's store does not answer: {error}"}


class _StoppedError(BaseException):
    """The endpoint would be called now. No `Exception`, so that nobody answers it."""


class _Reached:
    """Stands in the place of every endpoint: notes which was reached, and by which passage through the cache."""

    def __init__(self, app: FastAPI) -> None:
        self.site: Site | None = None
        self.exchange: Exchange | None = None
        for site in sites(app):
            if not isinstance(site.route.original_route, APIWebSocketRoute):
                site.route.dependant.call = self._stop(site, site.route.dependant.call)

    def _stop(self, site: Site, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        def stop() -> None:
            context = current()
            assert context is not None
            # It is not to be counted.
            self.site, self.exchange, context.exchange = site, context.exchange, None
            raise _StoppedError

        if is_awaited(endpoint):

            @wraps(endpoint)
            async def call(**_values: Any) -> None:
                stop()

        else:

            @wraps(endpoint)
            def call(**_values: Any) -> None:
                stop()

        return call


def _scope(method: str, address: str, headers: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, Any]:
    path, _, query = address.partition("?")
    given = {"host": "localhost"} | {name.lower(): value for name, value in headers.items()}
    raw_query = quote(query, safe="=&%+,;:/?@!$'()*[]")
    return scope_of(method, unquote(path), quote(path, safe="/%"), raw_query, given, state)


async def _send(app: FastAPI, scope: dict[str, Any], reached: _Reached) -> int | str:
    """Send a request, and return the status of its answer, or what the app has raised instead."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    try:
        await app(scope, receive, send)
    except _StoppedError:
        pass
    except Exception as error:
        return told(error)
    except BaseExceptionGroup:
        # A middleware with tasks of its own.
        if reached.site is None:
            raise
    return status


def _unreached(app: FastAPI, method: str, address: str, status: int | str) -> str:
    path = unquote(address.partition("?")[0])
    matching = [site for site in sites(app) if compile_path(site.template)[0].fullmatch(path) is not None]
    methods = {name for site in matching for name in site.route.methods or ()}
    if isinstance(status, str):
        return f"not looked up: the app raised {status}"
    if status == HTTPStatus.NOT_FOUND and not matching:
        return "not looked up: no route has this path"
    if status == HTTPStatus.METHOD_NOT_ALLOWED and method not in methods:
        return f"not looked up: this path takes {', '.join(sorted(methods))}, and not {method}"
    phrase = next((each.phrase for each in HTTPStatus if each == status), "")
    hint = "; say who is asking with --header" if status in (401, 403) else ""
    return f"not looked up: {status} {phrase}, from what comes before the endpoint{hint}"


async def _explained(
    site: Site, exchange: Exchange | None, overdrive: Overdrive, method: str, enabled: bool
) -> dict[str, Any]:
    findings: dict[str, Any] = {"route": site.name}
    mark = getattr(site.route.endpoint, CACHED, None)
    if mark is None:
        return findings | {"verdict": "not cached: its endpoint is not marked @cached"}
    plan = overdrive.installation.plans.get(id(site.route.dependant), "its declaration could not be read")
    if isinstance(plan, str):
        return findings | {"verdict": f"not cached: {plan}"}
    if exchange is None:
        return findings | {"verdict": f"not cached: only GET is, and this is {method}"}
    store = overdrive.cache.store
    off = await store.switched_off()
    findings["mode"] = _mode(site, mark, overdrive, off, enabled=enabled)
    findings["verdict"] = verdict(site, mark, plan)
    findings["key of"] = _inputs(site, mark, plan, overdrive)
    findings["key"] = exchange.key
    # The cache is off here, so that this says nothing else has kept it out.
    if exchange.why != "off":
        return findings | {"entry": f"not looked for: {exchange.why}"}
    if isinstance(store, MemoryStore):
        return findings | {"entry": _OWN_MEMORY}
    return findings | await _entry(exchange, overdrive)


async def _entry(exchange: Exchange, overdrive: Overdrive) -> dict[str, Any]:
    cache = overdrive.cache
    entry, instant, versions = await cache.store.load(exchange.key, exchange.policy.plan.fingerprint)
    if entry is None:
        return {"entry": "none: the next request makes it"}
    now = cache.clock()
    written = sorted(tag for tag, then in entry.versions.items() if versions.get(tag) != then)
    why: dict[str, str] = {}
    if entry.epoch != instant.epoch:
        worth = "not valid: the cache was cleared, or Redis emptied"
    elif written:
        worth = f"not valid: {', '.join(written)} was written since{_yet(exchange, entry, instant, versions, now)}"
        history = await cache.store.history()
        for tag in written:
            since = Instant(entry.epoch, entry.versions[tag])
            why[tag] = outdated_by(tag, since, versions.get(tag, instant.now), history)
    elif not entry.is_fresh(now):
        worth = "not valid: expired"
    else:
        worth = "valid"
    return {
        "entry": worth,
        "age": f"{now - entry.created:.1f} s",
        "ttl left": f"{entry.created + entry.ttl - now:.1f} s",
        "bytes": len(entry.body),
        "tags": {
            tag: {"then": then, "now": _now(versions.get(tag))} | ({"why": why[tag]} if tag in why else {})
            for tag, then in sorted(entry.versions.items())
        },
    }


def _yet(exchange: Exchange, entry: Entry, instant: Instant, versions: Mapping[str, int], now: float) -> str:
    """Say for how long an entry is of use yet that a write has outdated."""
    policy = exchange.policy
    if not (entry.may_be_outdated(instant.epoch, versions) and may_be_stale(entry.headers)):
        return ""
    age = now - entry.fresh_until(State.INVALIDATED)
    windows = {
        "while it is made anew": policy.stale_while_revalidate,
        "in place of an error": policy.stale_if_error,
    }
    left = [f"{window - age:.0f} s {when}" for when, window in windows.items() if age < window]
    return f", and served for {' and '.join(left)}" if left else ""


def _now(version: int | None) -> int | str | None:
    return "pending" if version == PENDING else version
