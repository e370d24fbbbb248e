"""What an endpoint touches: its session, its place in the cache.

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal, TypeVar, overload

from fastapi import Depends, Response
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .admission.gate import PRIORITY
from .admission.limit import PRIORITIES, Priority
from .cache.tags import tags_of
from .cache.trust import Mode
from .context import RequestContext, current
from .errors import ConfigurationError, NotInstalledError
from .pool.observe import observation_of
from .pool.session import (
    AsyncWork,
    CommitOn,
    Sessions,
    SyncSessions,
    SyncWork,
    successful,
)

F = TypeVar("F", bound=Callable[..., Any])

#: The attributes by which `cached` marks an endpoint, and `declare` a dependency; the installer looks for them.
CACHED = "__overdrive_cached__"
DECLARED = "__overdrive_declared__"


def _marked(function: F, name: str, told: object) -> F:
    try:
        setattr(function, name, told)
    except AttributeError:
        raise ConfigurationError(
            f"{function!r} cannot be marked: mark the function it is made of, a method where its class defines it"
        ) from None
    return function


# Sessions


class RequestSession:
    """A dependency: the request's `AsyncSession`, ended before the first byte of the response.

    engine: the name of the engine, where `Overdrive` has several.
    commit_on: says for which statuses the request's writes are kept; below 400 by default.

    Instances are dependencies of their own: `Depends(RequestSession("reports"))`.
    """

    def __init__(self, engine: str = "default", *, commit_on: CommitOn = successful) -> None:
        self.engine = engine
        self.commit_on = commit_on

    async def __call__(self, response: Response) -> AsyncSession:
        """Return the session; it takes a connection with its first statement."""
        context = _request("a session", "sessions: SessionFactoryDep")
        work = AsyncWork(context.runtime.sessions(self.engine).open(), self.commit_on)
        context.work.append(work)
        context.response = response
        return work.session


class SyncRequestSession:
    """A dependency: the request's synchronous `Session`, for endpoints that are plain functions.

    It has the parameters and the life of a `RequestSession`.
    """

    def __init__(self, engine: str = "default", *, commit_on: CommitOn = successful) -> None:
        self.engine = engine
        self.commit_on = commit_on

    async def __call__(self, response: Response) -> Session:
        """Return the session; it takes a connection with its first statement."""
        context = _request("a session", "sessions: SyncSessionFactoryDep")
        sessions: SyncSessions = context.runtime.sync_sessions(self.engine)
        let_go = await _admitted(sessions, context)
        asked = time.perf_counter()
        try:
            leave = await sessions.admitted()
        except BaseException:
            let_go()
            raise
        context.pool_wait += time.perf_counter() - asked

        def end() -> None:
            leave()
            let_go()

        work = SyncWork(sessions.open(), self.commit_on, end)
        context.work.append(work)
        context.response = response
        return work.session


async def _admitted(sessions: SyncSessions, context: RequestContext) -> Callable[[], None]:
    observation = observation_of(sessions.engine)
    if observation is None or (admission := observation.admission) is None:
        return lambda: None
    return admission.enter(context) or await admission.wait(context)


class SessionFactory:
    """A dependency: opens sessions of one's own, for background tasks, streams and websockets.

    `async with sessions() as db:` commits at the end of its block and rolls back if the block raises.
    """

    def __init__(self, engine: str = "default") -> None:
        self.engine = engine

    async def __call__(self) -> Sessions:
        """Return the factory."""
        return _context().runtime.sessions(self.engine)  # type: ignore[no-any-return]


class SyncSessionFactory:
    """A dependency: opens synchronous sessions of one's own, `with sessions() as db:`."""

    def __init__(self, engine: str = "default") -> None:
        self.engine = engine

    async def __call__(self) -> SyncSessions:
        """Return the factory."""
        return _context().runtime.sync_sessions(self.engine)  # type: ignore[no-any-return]


class ServedBy:
    """A dependency: the `Overdrive` that serves the request.

    A function that has it knows that FastAPI has called it, and no other function.
    """

    async def __call__(self) -> Any:
        """Return it."""
        return _context().runtime


get_session = RequestSession()
get_sync_session = SyncRequestSession()
get_session_factory = SessionFactory()
get_sync_session_factory = SyncSessionFactory()

SessionDep = Annotated[AsyncSession, Depends(get_session)]
SyncSessionDep = Annotated[Session, Depends(get_sync_session)]
SessionFactoryDep = Annotated[Sessions, Depends(get_session_factory)]
SyncSessionFactoryDep = Annotated[SyncSessions, Depends(get_sync_session_factory)]


def _context() -> RequestContext:
    context = current()
    if context is None or context.runtime is None:
        raise NotInstalledError(
            "this request passes no Overdrive: create Overdrive(app) for the app that serves it, or open a "
            "session with overdrive.session() where there is no request"
        )
    return context


def _request(what: str, instead: str) -> RequestContext:
    context = _context()
    if context.method == "WEBSOCKET":
        raise ConfigurationError(
            f"a websocket has no response before which {what} could end: take `{instead}` and open one for "
            "each unit of work"
        )
    return context


# Admission


def priority(level: Priority) -> Callable[[F], F]:
    """Say which requests are answered first when more come than the database can answer.

    level: "high" for what must be answered even then, and is little, a login or a check of health say: it is next,
        whatever else waits. "low" for what others are rather answered than: it is refused first. All else is "normal".

    It marks the endpoint and returns it unchanged, so it may stand above or below the route's decorator. Raises
    `ConfigurationError` for any other level.
    """
    if level not in PRIORITIES:
        raise ConfigurationError(f'@priority takes "high", "normal" or "low", not {level!r}')

    def mark(function: F) -> F:
        return _marked(function, PRIORITY, level)

    return mark


# The cache


@overload
def cached(endpoint: F, /) -> F: ...
@overload
def cached(
    *,
    ttl: float | timedelta | None = None,
    scope: Literal["public"] | None = None,
    tags: Collection[str] = (),
    depends: Collection[str] = (),
    body: bool = False,
    stale_while_revalidate: float | timedelta = 0,
    stale_if_error: float | timedelta = 0,
    outdated: bool = False,
    browser_ttl: float | timedelta = 0,
    mode: Mode | None = None,
    verify: float | None = None,
) -> Callable[[F], F]: ...
def cached(
    endpoint: Any = None,
    /,
    *,
    ttl: float | timedelta | None = None,
    scope: Literal["public"] | None = None,
    tags: Collection[str] = (),
    depends: Collection[str] = (),
    body: bool = False,
    stale_while_revalidate: float | timedelta = 0,
    stale_if_error: float | timedelta = 0,
    outdated: bool = False,
    browser_ttl: float | timedelta = 0,
    mode: Mode | None = None,
    verify: float | None = None,
) -> Any:
    """Keep an endpoint's responses until they expire or something they read is written.

    ttl: seconds (or a `timedelta`) a response is fresh; left out, the setting `cache.ttl` decides.
    scope: "public" says that everybody gets the same response, whoever is asking: then a hit is answered before
        the route's dependencies, those that authenticate among them. Left out, a response belongs to whoever the
        route's dependencies read the identity of, and they run first.
    tags: names of one's own that outdate the responses, besides what they read: `await cache.invalidate("catalogue")`
        drops what `tags=["catalogue"]` has marked, for all tenants.
    depends: the tables that are read in ways nobody can read off the statements (textual SQL, functions, views): by
        name, or `engine/table` for another engine's. Without it such a response is not kept.
    body: a POST is cached too, by its body of JSON: it asks for something, as a search does. One that has written is
        never stored.
    stale_while_revalidate: seconds after its end in which a response is served yet, while the request is run once
        more to make it anew (RFC 5861, section 3). What a middleware opens for the time of a request, and puts into
        its scope, is closed by then.
    stale_if_error: seconds after its end in which a response stands in for an exception, or for a 500, 502, 503 or
        504 (RFC 5861, section 4).
    outdated: what a write has outdated is served in these two windows as well. They count from when it was made then,
        so that no answer is further behind the database than its window is long; and whoever has written may be
        answered what was there before. Dependencies run as on any hit, so who may see it is asked there and not in
        the endpoint. What was dropped by hand, by `invalidate` or `clear`, is gone all the same.
    browser_ttl: whole seconds for which a browser need not ask again, whatever is written meanwhile; so may caches on
        the way, if the scope is "public". Left out, a browser asks each time, and is told if it has it already. An
        endpoint's own `Cache-Control` wins over both.
    mode: "on" answers with what is kept. "shadow" never does: the endpoint runs, its response is sent and compared
        with what is kept, and differences are counted and logged by their JSON paths. "off" leaves the cache out.
        Left out, the setting `cache.mode` decides.
    verify: the share of hits, from 0 to 1, that are treated as in shadow while the mode is "on"; left out, the
        setting `cache.verify` decides.

    A response that says `must-revalidate` or `proxy-revalidate` is served in no window (RFC 9111, section 4.2.4). What
    clients say in `Cache-Control` is not heeded:
    who asks the database is not up to them. It marks the endpoint and returns it unchanged, so it may stand above or
    below the route's decorator. Raises `ConfigurationError` for a `ttl` that is not positive, for `outdated` without a
    window, and any other value that is none of these.
    """
    seconds = None if ttl is None else _seconds("ttl", ttl)
    if scope not in (None, "public"):
        raise ConfigurationError(f'@cached(scope=...) takes "public", not {scope!r}')
    if seconds == 0:
        raise ConfigurationError(f"@cached(ttl=...) takes a positive number of seconds, not {ttl!r}")
    if mode not in (None, "on", "shadow", "off"):
        raise ConfigurationError(f'@cached(mode=...) takes "on", "shadow" or "off", not {mode!r}')
    if verify is not None and not (isinstance(verify, int | float) and 0 <= verify <= 1):
        raise ConfigurationError(f"@cached(verify=...) takes a share from 0 to 1, not {verify!r}")
    browser_seconds = _seconds("browser_ttl", browser_ttl)
    if browser_seconds % 1:
        # RFC 9111, section 1.2.2.
        raise ConfigurationError(f"@cached(browser_ttl=...) takes whole seconds, not {browser_ttl!r}")
    if not isinstance(body, bool):
        raise ConfigurationError(f"@cached(body=...) takes True or False, not {body!r}")
    windows = _seconds("stale_while_revalidate", stale_while_revalidate), _seconds("stale_if_error", stale_if_error)
    if not isinstance(outdated, bool) or (outdated and not any(windows)):
        raise ConfigurationError(
            "@cached(outdated=...) takes True or False, and says of windows that they hold for what was written, too: "
            "give it stale_while_revalidate= or stale_if_error="
        )
    told = Mark(
        ttl=seconds,
        public=scope == "public",
        tags=tuple(tags_of(tags)),
        depends=tuple(tags_of(depends)),
        body=body,
        stale_while_revalidate=windows[0],
        stale_if_error=windows[1],
        outdated=outdated,
        browser_ttl=int(browser_seconds),
        mode=mode,
        verify=verify,
    )

    def mark(function: F) -> F:
        if not callable(function):
            raise ConfigurationError(
                f"@cached takes no positional argument but the endpoint: @cached(ttl={endpoint!r})"
            )
        return _marked(function, CACHED, told)

    return mark if endpoint is None else mark(endpoint)


def _seconds(name: str, value: float | timedelta) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        least = "a positive" if name == "ttl" else "a"
        raise ConfigurationError(
            f"@cached({name}=...) takes {least} number of seconds, or a timedelta that is not negative, not {value!r}"
        )
    return seconds


@dataclass(frozen=True, slots=True)
class Mark:
    """What `cached` was told of an endpoint, in seconds; what is None is decided by a setting."""

    ttl: float | None
    public: bool
    tags: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    body: bool = False
    stale_while_revalidate: float = 0
    stale_if_error: float = 0
    outdated: bool = False
    browser_ttl: int = 0
    mode: Mode | None = None
    verify: float | None = None


@dataclass(frozen=True, slots=True)
class Declaration:
    """What `declare` was told of a dependency."""

    principal: Callable[[Any], Any] | None


def declare(
    dependency: Callable[..., Any], *, principal: Callable[[Any], Any] | None = None, ignore: bool = False
) -> None:
    """Say what a dependency has to do with the responses of cached routes, where its parameters do not tell.

    That is so where it takes the whole `Request`: such a route is not cached until it is declared, once.

    principal: a function from what the dependency returns to text, or a number, that says who is asking. Each has
        entries of their own, whatever credential they come with; one for whom it is None has those of nobody. The
        dependency runs on a hit, too.
    ignore: it may refuse a request, and has no say in what is answered.

    Raises `ConfigurationError` unless one of the two is given.
    """
    if (principal is None) is not ignore:
        raise ConfigurationError("declare() takes either principal=, a function, or ignore=True")
    _marked(dependency, DECLARED, Declaration(principal))
