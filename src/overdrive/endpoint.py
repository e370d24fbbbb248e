"""What an endpoint touches: its session, its page, its place in the cache.

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from typing import Annotated, Any, TypeVar, overload
from urllib.parse import parse_qsl

import msgspec
from fastapi import Depends, Query, Response
from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .config import PaginationSettings
from .context import RequestContext, current
from .errors import ConfigurationError, NotInstalledError, PageError
from .pagination import select, walk
from .pagination.cursor import MAX_LENGTH
from .pagination.page import MAX_PAGE, CursorPage, CursorParams, Page, PageParams
from .pool.session import (
    AsyncWork,
    CommitOn,
    Sessions,
    SyncSessions,
    SyncWork,
    execute,
    execute_sync,
    successful,
)

F = TypeVar("F", bound=Callable[..., Any])

#: Signs cursors where no secret is set; they end with the process.
PROCESS_KEY = secrets.token_bytes(32)

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


# Pages


@overload
def paginate(db: AsyncSession, statement: Executable, *, page: PageParams) -> Awaitable[Page[Any]]: ...
@overload
def paginate(db: AsyncSession, statement: Executable, *, cursor: CursorParams) -> Awaitable[CursorPage[Any]]: ...
@overload
def paginate(db: AsyncSession, statement: Executable) -> Awaitable[Any]: ...
@overload
def paginate(db: Session, statement: Executable, *, page: PageParams) -> Page[Any]: ...
@overload
def paginate(db: Session, statement: Executable, *, cursor: CursorParams) -> CursorPage[Any]: ...
@overload
def paginate(db: Session, statement: Executable) -> Any: ...
def paginate(
    db: AsyncSession | Session,
    statement: Executable,
    *,
    page: PageParams | None = None,
    cursor: CursorParams | None = None,
) -> Any:
    """Return one page of the rows of `statement`.

    db: a session; with an `AsyncSession` the page is awaited.
    statement: a `select()`; it has no LIMIT of its own.
    page, cursor: where to be in the rows. Left out, the endpoint's declared type decides (`Page[...]` or
        `CursorPage[...]` as response model or return type) and the client's parameters are used.

    Raises `PageError` where the statement cannot be paginated as written, and `InvalidCursorError` (a 400) for
    a cursor that is damaged or was made for something else.
    """
    parameters = page or cursor or _declared()
    context = current()
    if context is not None:
        context.page_style = "cursor" if isinstance(parameters, CursorParams) else "page"
    if isinstance(parameters, CursorParams):
        steps: Any = walk.cursor_page(
            statement,
            parameters,
            dialect_name=_dialect_name(db, statement),
            binding=_binding(context),
            key=context.cursor_key if context is not None else PROCESS_KEY,
        )
    else:
        steps = select.page(statement, parameters)
    if isinstance(db, AsyncSession):
        return select.run_async(steps, partial(execute, db))
    return select.run(steps, partial(execute_sync, db))


def page_dependency(style: str, settings: PaginationSettings) -> Callable[..., Awaitable[None]]:
    """Return the dependency that reads the page a client asks for, within the sizes the settings allow."""
    size_query = Query(ge=1, le=settings.max_size, description="The most rows to return.")
    page_query = Query(ge=1, le=MAX_PAGE, description="The page's number, from 1.")
    cursor_query = Query(
        max_length=MAX_LENGTH,
        description="The `next_cursor` or `prev_cursor` of another page; leave it out for the first page.",
    )

    async def by_page(page: Annotated[int, page_query] = 1, size: Annotated[int, size_query] = settings.size) -> None:
        _ask_for(PageParams(page=page, size=size))

    async def by_cursor(
        cursor: Annotated[str | None, cursor_query] = None, size: Annotated[int, size_query] = settings.size
    ) -> None:
        _ask_for(CursorParams(cursor=cursor, size=size))

    return by_page if style == "page" else by_cursor


def _ask_for(parameters: PageParams | CursorParams) -> None:
    if (context := current()) is not None:
        context.page = parameters


def _declared() -> PageParams | CursorParams:
    context = current()
    if context is None or context.page is None:
        raise PageError(
            "paginate() does not know which page is asked for: declare the endpoint's type, as in "
            "response_model=Page[UserOut], on an app with Overdrive(app) or add_pagination(app), or pass page= or "
            "cursor="
        )
    return context.page  # type: ignore[no-any-return]


def _dialect_name(db: AsyncSession | Session, statement: Executable) -> str:
    session = db.sync_session if isinstance(db, AsyncSession) else db
    return session.get_bind(clause=statement).dialect.name  # type: ignore[arg-type]


def _binding(context: RequestContext | None) -> bytes:
    """Bind a cursor to everything in the request's address but the cursor and the size."""
    if context is None:
        return b""
    parameters = parse_qsl(context.query, keep_blank_values=True)
    filters = sorted(pair for pair in parameters if pair[0] not in ("cursor", "size"))
    return blake2b(msgspec.msgpack.encode((context.path, filters)), digest_size=16).digest()


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
