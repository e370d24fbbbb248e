"""What an endpoint touches of pagination: `paginate`, and the parameters a client sends.

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import ast
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b
from inspect import isawaitable
from multiprocessing import current_process
from textwrap import dedent
from typing import Annotated, Any, get_args, overload
from urllib.parse import parse_qsl

import msgspec
from fastapi import Query as QueryParameter
from fastapi import Request, Response
from pydantic import BaseModel
from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Query, Session

from .config import PaginationSettings
from .context import RequestContext, current
from .errors import PageError, PageTooDeepError
from .lists import ListKeeper
from .pagination import number, walk
from .pagination.body import Writer
from .pagination.link import link_header
from .pagination.page import (
    MAX_OFFSET,
    MAX_PAGE,
    BasePage,
    CountedCursorPage,
    CountedPage,
    CursorPage,
    CursorParams,
    Found,
    LimitOffsetPage,
    LimitOffsetParams,
    Page,
    PageParams,
    Params,
    Style,
    Total,
    slice_of,
)
from .pagination.recipe import Recipes
from .pagination.select import Steps, run, run_async
from .pool.session import adds_nothing, send, send_sync

#: Signs cursors where no secret is set. It is made of what `multiprocessing` hands from a process to those it starts,
#: so that all workers of one uvicorn have the same, and ends with that server.
PROCESS_KEY = blake2b(current_process().authkey, person=b"overdrive.cursor").digest()


#: What a page is put into where no route declares it: the first that can say the total.
_ENVELOPES: dict[Style, tuple[type[BasePage[Any]], ...]] = {
    "page": (Page, CountedPage),
    "limit_offset": (LimitOffsetPage,),
    "cursor": (CursorPage, CountedCursorPage),
}

_recipes = Recipes()

#: How many pages of each style this process has begun.
served: dict[Style, int] = dict.fromkeys(_ENVELOPES, 0)

Transform = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks of a route that declares a page: its `context.page`.

    envelope: the page the route declares, `Page[UserOut]`.
    params: what the client has sent; None where the endpoint takes that itself.
    path: the request's path as the client sees it, in front of any proxy.
    model: of the items, where nothing but this model will read them.
    writer: makes the response's body of a page that this model would not change, where nothing else has a say in it.
    """

    envelope: type[BasePage[Any]]
    params: Params | None
    path: str
    settings: PaginationSettings
    model: type[BaseModel] | None
    writer: Writer | None


@overload
def paginate(
    db: AsyncSession,
    statement: Executable,
    *,
    page: PageParams | None = None,
    limit_offset: LimitOffsetParams | None = None,
    cursor: CursorParams | None = None,
    total: Total | None = None,
    count_query: Executable | None = None,
    transform: Transform | None = None,
) -> Awaitable[Any]: ...
@overload
def paginate(
    db: Session | Sequence[Any],
    statement: Executable | None = None,
    *,
    page: PageParams | None = None,
    limit_offset: LimitOffsetParams | None = None,
    cursor: CursorParams | None = None,
    total: Total | None = None,
    count_query: Executable | None = None,
    transform: Transform | None = None,
) -> Any: ...
def paginate(
    db: AsyncSession | Session | Sequence[Any],
    statement: Executable | None = None,
    *,
    page: PageParams | None = None,
    limit_offset: LimitOffsetParams | None = None,
    cursor: CursorParams | None = None,
    total: Total | None = None,
    count_query: Executable | None = None,
    transform: Transform | None = None,
) -> Any:
    """Return one page of the rows of `statement`, in the envelope that the endpoint declares.

    db: a session; with an `AsyncSession` the page is awaited. Or a list or tuple of rows, without a statement.
    statement: a `select()` without LIMIT, a union, or `text(...).columns(...)`. A select of one entity has each
        row of it once, whatever it is joined to.
    page, limit_offset, cursor: where to be in the rows. Left out, the endpoint's declared type decides (`Page[...]`,
        `LimitOffsetPage[...]`, `CursorPage[...]` as response model or return type) and what the client has sent.
    total: "exact"; "capped", which counts to 10,000; "estimated", the expectation of PostgreSQL's planner, elsewhere
        capped; or "none". It is one that the envelope can say: `CountedPage` and `CountedCursorPage` can say all.
        A route may leave the choice to its clients, with a parameter `total: Literal["capped", "none"] = "capped"`.
    count_query: a select of one integer, the exact total, where that is quicker than counting the rows.
    transform: a function, with an `AsyncSession` also a coroutine function, from the list of rows to the page's items.

    Raises `PageError` where the statement cannot be paginated as written, `InvalidCursorError` (a 400) for a cursor
    that is damaged or was made for something else, `PageTooDeepError` (a 400) beyond `pagination.max_offset`.
    """
    context = current()
    asked: Asked | None = context.page if context is not None else None
    params = _params(asked, [each for each in (page, limit_offset, cursor) if each is not None])
    envelope = _envelope(asked, params, total)
    total = total or envelope.totals[0]
    served[params.style] += 1
    if context is not None:
        context.page_style = params.style

    def finished(found: Found) -> Any:
        if context is not None and asked is not None and context.response is not None:
            _link(context, asked, found)
            # A status that a dependency has set may have no body.
            if asked.writer is not None and context.response.status_code is None:
                body = asked.writer.write(found)
                if body is not None:
                    return _answer(body, context.response)
        return envelope.of(found)

    if isinstance(db, AsyncSession | Session):
        model = asked.model if asked is not None and transform is None else None
        keeper = ListKeeper.of(db, statement, context) if statement is not None else None
        steps = _steps(db, statement, params, total, count_query, context, model, keeper)
        if isinstance(db, AsyncSession):
            return _awaited(run_async(steps, partial(send, db)), transform, finished)
        found = run(steps, partial(send_sync, db), keeper.wait if keeper is not None else None)
    else:
        found = _slice(db, statement, params)
    return finished(found if transform is None else replace(found, items=_transformed(found.items, transform)))


def _params(asked: Asked | None, given: list[Params]) -> Params:
    if len(given) > 1:
        raise PageError("paginate() takes one of page=, limit_offset= and cursor=.")
    params = given[0] if given else asked.params if asked is not None else None
    if params is None:
        raise PageError(
            "paginate() does not know which page is asked for: declare the endpoint's type, as in "
            "response_model=Page[UserOut], on an app with Overdrive(app) or add_pagination(app), before its first "
            "request, or pass page=, limit_offset= or cursor="
        )
    if asked is not None and not isinstance(params, CursorParams) and params.offset > asked.settings.max_offset:
        raise PageTooDeepError(
            f"The page begins after {params.offset} rows, and no page by number begins after more than "
            f"{asked.settings.max_offset}: narrow the filter, or use an endpoint with cursors."
        )
    return params


def _envelope(asked: Asked | None, params: Params, total: Total | None) -> type[BasePage[Any]]:
    candidates = _ENVELOPES[params.style] if asked is None else (asked.envelope,)
    envelope = next((each for each in candidates if total is None or total in each.totals), candidates[0])
    if envelope.style != params.style:
        raise PageError(
            f"The endpoint declares {envelope.__name__}, a page by {envelope.style}, and paginate() is given "
            f"{type(params).__name__}: declare {_ENVELOPES[params.style][0].__name__}."
        )
    if total is not None and total not in envelope.totals:
        raise PageError(
            f'{envelope.__name__} cannot say a total that is "{total}": declare CountedPage[...] or '
            "CountedCursorPage[...], or an envelope of your own that names it in `totals`."
        )
    return envelope


def _steps(
    db: AsyncSession | Session,
    statement: Executable | None,
    params: Params,
    total: Total,
    count_query: Executable | None,
    context: RequestContext | None,
    model: type[BaseModel] | None,
    keeper: ListKeeper | None,
) -> Steps[Found]:
    if statement is None:
        raise PageError("paginate() of a session needs a statement: paginate(db, select(User)).")
    if isinstance(statement, Query) or not isinstance(statement, Executable):
        raise PageError(
            f"paginate() takes a statement, paginate(db, select(User)), and not an object of type "
            f"{type(statement).__name__}: of a Query pass its `statement`, of SQL text(...).columns(...)."
        )
    if count_query is not None and total != "exact":
        raise PageError(f'count_query= gives the exact total, and total= is "{total}": leave out one of them.')
    session = db.sync_session if isinstance(db, AsyncSession) else db
    dialect_name = session.get_bind(clause=statement).dialect.name  # type: ignore[arg-type]
    if not isinstance(params, CursorParams):
        return number.page(
            statement,
            params,
            recipes=_recipes,
            total=total,
            count_query=count_query,
            dialect_name=dialect_name,
            model=model,
            adds_nothing=partial(adds_nothing, session),
            keeper=keeper,
        )
    walked = walk.cursor_page(
        statement,
        params,
        recipes=_recipes,
        dialect_name=dialect_name,
        binding=_binding(context),
        keys=context.cursor_keys if context is not None else (PROCESS_KEY,),
        model=model,
        adds_nothing=partial(adds_nothing, session),
    )
    return walked if total == "none" else _counted(walked, statement, total, count_query, dialect_name, keeper)


def _counted(
    walked: Steps[Found],
    statement: Executable,
    total: Total,
    count_query: Executable | None,
    dialect_name: str,
    keeper: ListKeeper | None,
) -> Steps[Found]:
    found = yield from walked
    if found.next_cursor is None and found.prev_cursor is None:
        return replace(found, total=len(found.items), total_kind="exact")
    rows, kind = yield from number.total_of(
        statement, total, recipes=_recipes, count_query=count_query, dialect_name=dialect_name, keeper=keeper
    )
    return replace(found, total=rows, total_kind=kind)


def _slice(rows: Any, statement: Executable | None, params: Params) -> Found:
    if statement is not None or isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise PageError(
            f"paginate() takes a session and a statement, or a list of rows, not a {type(rows).__name__}: of a scoped "
            "session, pass the session itself."
        )
    if isinstance(params, CursorParams):
        raise PageError("A list has no order keys to make a cursor of: declare Page[...] or LimitOffsetPage[...].")
    return slice_of(rows, params)


def _transformed(items: list[Any], transform: Transform) -> Any:
    items = transform(items)
    if isawaitable(items):
        if isinstance(items, Coroutine):
            items.close()
        raise PageError("This transform is a coroutine function, and nothing is awaited here: make it a plain one.")
    return items


async def _awaited(making: Awaitable[Found], transform: Transform | None, finished: Callable[[Found], Any]) -> Any:
    found = await making
    if transform is not None:
        items = transform(found.items)
        found = replace(found, items=await items if isawaitable(items) else items)
    return finished(found)


# What a client asks for


def page_dependency(
    envelope: type[BasePage[Any]],
    settings: PaginationSettings,
    *,
    taken: bool = False,
    endpoint: Callable[..., Any] | None = None,
    as_usual: bool = False,
) -> Callable[..., Awaitable[None]]:
    """Return the dependency that reads the page a client asks for, within the sizes the settings allow.

    taken: whether the endpoint reads that itself.
    endpoint: the function that answers; where it returns pages as `paginate` makes them, they need hold no more than
        the response model reads.
    as_usual: whether the response is made of them as FastAPI does where it is told nothing.
    """
    model = _item_model(envelope) if endpoint is not None and _returns_pages_as_made(endpoint) else None
    is_final = as_usual and model is not None and _ends_with_its_return(endpoint)
    writer = Writer.of(envelope, model) if is_final and model is not None else None
    size_query = QueryParameter(ge=1, le=settings.max_size, description="The most rows to return.")
    page_query = QueryParameter(ge=1, le=MAX_PAGE, description="The page's number, from 1.")
    offset_query = QueryParameter(ge=0, le=MAX_OFFSET, description="Rows to skip.")
    cursor_query = QueryParameter(
        description="The `next_cursor` or `prev_cursor` of another page; leave it out for the first page.",
    )

    def ask(request: Request, response: Response, params: Params | None) -> None:
        if (context := current()) is not None:
            context.response = response
            context.page = Asked(envelope, params, _public_path(request), settings, model, writer)

    async def by_page(
        request: Request,
        response: Response,
        page: Annotated[int, page_query] = 1,
        size: Annotated[int, size_query] = settings.size,
    ) -> None:
        ask(request, response, PageParams(page=page, size=size))

    async def by_limit_offset(
        request: Request,
        response: Response,
        limit: Annotated[int, size_query] = settings.size,
        offset: Annotated[int, offset_query] = 0,
    ) -> None:
        ask(request, response, LimitOffsetParams(limit=limit, offset=offset))

    async def by_cursor(
        request: Request,
        response: Response,
        cursor: Annotated[str | None, cursor_query] = None,
        size: Annotated[int, size_query] = settings.size,
    ) -> None:
        ask(request, response, CursorParams(cursor=cursor, size=size))

    async def by_endpoint(request: Request, response: Response) -> None:
        ask(request, response, None)

    styles: dict[Style, Callable[..., Awaitable[None]]] = {
        "page": by_page,
        "limit_offset": by_limit_offset,
        "cursor": by_cursor,
    }
    return by_endpoint if taken else styles[envelope.style]


def _item_model(envelope: type[BasePage[Any]]) -> type[BaseModel] | None:
    """Return the model of an envelope's items, unless its class looks at them itself."""
    field = envelope.model_fields.get("items")
    of: Any = envelope.of
    if field is None or of.__func__ is not BasePage.of.__func__:  # type: ignore[attr-defined]
        return None
    models = [each for each in get_args(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
    return models[0] if field.annotation == list[tuple(models)] else None  # type: ignore[misc]


def _function(endpoint: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the source of an endpoint; None where it cannot be read, or is not all that is called."""
    try:
        [function] = ast.parse(dedent(inspect.getsource(endpoint))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not hasattr(endpoint, "__wrapped__"):
        return function
    return None


def _returns_pages_as_made(endpoint: Callable[..., Any]) -> bool:
    """Say whether all that an endpoint does with `paginate` is to return what it gives; read in its source."""
    function = _function(endpoint)
    if function is None:
        return False
    names = {name for name, value in _names_in(endpoint).items() if value is paginate} | {paginate.__name__}
    mentioned = [node for node in ast.walk(function) if _name_of(node) in names]
    returned = [each.value.value if isinstance(each.value, ast.Await) else each.value for each in _returns(function)]
    called = [node.func for node in returned if isinstance(node, ast.Call)]
    return bool(mentioned) and all(node in called for node in mentioned)


def _ends_with_its_return(endpoint: Any) -> bool:
    """Say whether nothing of an endpoint runs after its `return`, which might set another header."""
    function = _function(endpoint)
    later = ast.Try | ast.TryStar | ast.With | ast.AsyncWith
    return function is not None and not any(isinstance(node, later) for node in ast.walk(function))


def _returns(function: ast.AST) -> Iterator[ast.Return]:
    """Yield the `return` statements of a function, without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Return):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returns(node)


def _name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _names_in(function: Any) -> dict[str, Any]:
    variables = inspect.getclosurevars(function)
    return {**variables.globals, **variables.nonlocals}


def _public_path(request: Request) -> str:
    """Return the request's path with what a proxy has taken from its front (ASGI's root path)."""
    path: str = request.scope["path"]
    root: str = request.scope.get("root_path", "").rstrip("/")
    return path if path.startswith(f"{root}/") else root + path


def _answer(body: bytes, made: Response) -> Response:
    """Return the response that FastAPI would make of a page with this body, with what dependencies have set."""
    response = Response(body, media_type="application/json")
    response.raw_headers += made.raw_headers
    return response


def _link(context: RequestContext, asked: Asked, found: Found) -> None:
    # Where the endpoint has made up other parameters, nobody knows how to ask for its neighbours.
    if asked.settings.link_header and asked.params in (None, found.params):
        value = link_header(asked.path, context.query, found, asked.settings.max_offset)
        context.response.headers["link"] = value


def _binding(context: RequestContext | None) -> bytes:
    """Bind a cursor to the tenant, the style of the page, and all of the address but the cursor and the size."""
    if context is None:
        return b""
    return _digest_of(context.path, context.query, context.page_style, context.tenant)


@lru_cache
def _digest_of(path: str, query: str, style: Style | None, tenant: str | None) -> bytes:
    parameters = parse_qsl(query, keep_blank_values=True)
    filters = sorted(pair for pair in parameters if pair[0] not in ("cursor", "size"))
    return blake2b(msgspec.msgpack.encode((path, style, filters, tenant)), digest_size=16).digest()
