"""What an endpoint touches: its session, its place in the cache.

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any, TypeVar, overload

from fastapi import Depends, Response
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .context import RequestContext, current
from .errors import ConfigurationError, NotInstalledError
from .pool.session import (
    AsyncWork,
    CommitOn,
    Sessions,
    SyncSessions,
    SyncWork,
    successful,
)

F = TypeVar("F", bound=Callable[..., Any])

#: The attribute by which `cached` marks an endpoint; the installer looks for it.
CACHED = "__overdrive_cached__"


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
        asked = time.perf_counter()
        leave = await sessions.admitted()
        context.pool_wait += time.perf_counter() - asked
        work = SyncWork(sessions.open(), self.commit_on, leave)
        context.work.append(work)
        context.response = response
        return work.session


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


# The cache


@overload
def cached(endpoint: F, /) -> F: ...
@overload
def cached(*, ttl: float | timedelta | None = None) -> Callable[[F], F]: ...
def cached(endpoint: Any = None, /, *, ttl: float | timedelta | None = None) -> Any:
    """Keep an endpoint's responses until they expire or something they read is written.

    ttl: seconds (or a `timedelta`) a response is fresh; left out, the setting `cache.ttl` decides.

    It marks the endpoint and returns it unchanged, so it may stand above or below the route's decorator. Raises
    `ConfigurationError` for a `ttl` that is not positive.
    """
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if seconds is not None and not seconds > 0:
        raise ConfigurationError(f"@cached(ttl=...) takes a positive number of seconds, not {ttl!r}")

    def mark(function: F) -> F:
        if not callable(function):
            raise ConfigurationError(
                f"@cached takes no positional argument but the endpoint: @cached(ttl={endpoint!r})"
            )
        setattr(function, CACHED, Mark(seconds))
        return function

    return mark if endpoint is None else mark(endpoint)


class Mark:
    """What `cached` was told of an endpoint: seconds to live, or None for the setting's."""

    __slots__ = ("ttl",)

    def __init__(self, ttl: float | None) -> None:
        self.ttl = ttl
