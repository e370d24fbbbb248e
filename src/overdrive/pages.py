"""What an endpoint touches of pagination: `paginate`, and the parameters a client sends.

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import blake2b
from typing import Annotated, Any, overload
from urllib.parse import parse_qsl

import msgspec
from fastapi import Query
from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .config import PaginationSettings
from .context import RequestContext, current
from .errors import PageError
from .pagination import select, walk
from .pagination.cursor import MAX_LENGTH
from .pagination.page import MAX_PAGE, CursorPage, CursorParams, Page, PageParams
from .pool.session import execute, execute_sync

#: Signs cursors where no secret is set; they end with the process.
PROCESS_KEY = secrets.token_bytes(32)


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
