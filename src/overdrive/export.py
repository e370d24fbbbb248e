"""`stream`: every row of a statement as a response, read batch by batch while it is sent."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from anyio.lowlevel import checkpoint
from pydantic import BaseModel, TypeAdapter
from pydantic_core import from_json
from sqlalchemy import Select, inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.base import Executable
from sqlalchemy.types import Indexable
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .context import current
from .errors import ConfigurationError, PageError
from .pagination.page import CursorParams, Found
from .pagination.recipe import Recipes
from .pagination.select import Steps, run, run_async
from .pagination.walk import cursor_page, walkable
from .pool.session import SyncSessions, adds_nothing, send, send_sync
from .pool.tasks import to_the_end

#: What opens the session of each batch.
OpenSession = Callable[[], AbstractAsyncContextManager[AsyncSession]] | SyncSessions

_MEDIA_TYPES = {
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8; header=present",  # RFC 4180, section 3
}

#: Rows of the first batch, and of the largest.
_FIRST_SIZE, _LARGEST_SIZE = 100, 1_000
#: Bytes a batch aims at: a thousand rows may be anything.
_BATCH_BYTES = 1_048_576

_recipes = Recipes()


def stream(
    sessions: OpenSession,
    statement: Executable,
    model: type[BaseModel] | None = None,
    *,
    format: Literal["ndjson", "csv"] = "ndjson",  # noqa: A002
    filename: str | None = None,
) -> StreamingResponse:
    """Return a response with every row of `statement`, for the endpoint to return.

    sessions: `sessions: SessionFactoryDep`, or `SyncSessionFactoryDep` in plain functions; or an
        `async_sessionmaker`, or whatever else works in `async with sessions() as db`. Each batch is read in a
        session of its own, which is rolled back, and its connection is back before the batch is sent.
    statement: a `select()` without LIMIT that `CursorPage` can walk; the rows come in its order.
    model: what validates and serializes each row. Without one, a row has the columns of the statement, or those
        of its one entity but the deferred ones.
    format: "ndjson", a JSON object a line; or "csv" (RFC 4180) in UTF-8, with a header line. A NULL is an empty
        cell. Text that a spreadsheet would take for a formula gets an apostrophe in front (OWASP, "CSV
        Injection"): what begins with = + - @, their full-width forms, a tab, a line break or NUL, and is no number.
    filename: what a browser saves it as (RFC 6266).

    The request's own sessions are committed before the first batch is read. Each batch is a snapshot of its own:
    a row that nobody changes in the meantime appears exactly once. The next batch is read when the server takes
    more, so a slow client slows the reading down, and one that goes away ends it.

    Raises `ConfigurationError` for arguments that cannot work, and `PageError` for a statement that cannot be
    walked or whose columns cannot be written. What fails until the first batch is there is answered like any
    error of an endpoint; what fails later is raised to the server, which breaks the connection off, so that no
    response looks complete with rows missing.
    """
    if isinstance(sessions, AsyncSession | Session | sessionmaker) or not callable(sessions):
        raise ConfigurationError(
            f"stream() opens a session for each batch, which it cannot with this {type(sessions).__name__}: take "
            "`sessions: SessionFactoryDep` (or SyncSessionFactoryDep), and pass that"
        )
    if format not in _MEDIA_TYPES:
        raise ConfigurationError(f"stream() writes {' or '.join(_MEDIA_TYPES)}, not {format!r}")
    if model is not None and not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ConfigurationError(f"stream() serializes rows with a pydantic model, not with {model!r}")
    rows = walkable(statement)
    dump = _column_dumper(rows) if model is None else _model_dumper(model)
    head, encode = b"", _ndjson
    if format == "csv":
        names = _cells_of_statement(rows) if model is None else _cells_of_model(model)
        head, encode = _csv([names]), partial(_csv_rows, names)

    async def batch(params: CursorParams) -> tuple[bytes, str | None]:
        page = await _read(sessions, statement, model, params)
        return encode(dump(page.items)), page.next_cursor

    headers = None if filename is None else {"content-disposition": _disposition(filename)}
    return _Export(_chunks(batch, head), media_type=_MEDIA_TYPES[format], headers=headers)


def _disposition(filename: str) -> str:
    # RFC 8187: whatever is in the name, it ends neither the parameter nor the header.
    quoted = quote(filename, safe="")
    return f'attachment; filename="{filename}"' if quoted == filename else f"attachment; filename*=UTF-8''{quoted}"


# Batches


class _Export(StreamingResponse):
    """A streaming response that has its first chunk before it starts, while an error can still be answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (context := current()) is not None:
            # Requests that hold a connection and wait for another one may all wait for each other.
            for unit in context.work:
                await to_the_end(unit.end(self.status_code))
        rest = aiter(self.body_iterator)
        self.body_iterator = _chain(await anext(rest), rest)
        await super().__call__(scope, receive, send)


async def _chain(first: Any, rest: AsyncIterable[Any]) -> AsyncIterator[Any]:
    yield first
    async for chunk in rest:
        yield chunk


async def _chunks(
    batch: Callable[[CursorParams], Awaitable[tuple[bytes, str | None]]], head: bytes
) -> AsyncIterator[bytes]:
    params = CursorParams(size=_FIRST_SIZE)
    while True:
        # A server takes what is sent to a client that has gone, and has this task cancelled right after.
        await checkpoint()
        chunk, cursor = await batch(params)
        yield head + chunk
        if cursor is None:
            return
        head = b""
        size = params.size * _BATCH_BYTES // len(chunk)
        params = CursorParams(cursor=cursor, size=max(1, min(size, _LARGEST_SIZE)))


async def _read(
    sessions: OpenSession, statement: Executable, model: type[BaseModel] | None, params: CursorParams
) -> Found:
    if isinstance(sessions, SyncSessions):
        leave = await sessions.admitted()
        try:
            return await run_in_threadpool(_read_sync, sessions, statement, model, params)
        finally:
            leave()
    async with sessions() as db:
        page = await run_async(_steps(db.sync_session, statement, model, params), partial(send, db))
        # Rolls back, and leaves the rows as they were loaded.
        await db.close()
    return page


def _read_sync(
    sessions: SyncSessions, statement: Executable, model: type[BaseModel] | None, params: CursorParams
) -> Found:
    with sessions() as db:
        page = run(_steps(db, statement, model, params), partial(send_sync, db))
        db.close()
    return page


def _steps(
    session: Session, statement: Executable, model: type[BaseModel] | None, params: CursorParams
) -> Steps[Found]:
    return cursor_page(
        statement,
        params,
        recipes=_recipes,
        dialect_name=session.get_bind(clause=statement).dialect.name,  # type: ignore[arg-type]
        # The cursors stay in this process, so nobody can forge one.
        binding=b"",
        keys=[b""],
        model=model,
        adds_nothing=partial(adds_nothing, session),
    )


# From what a page holds to one JSON array


@lru_cache
def _model_dumper(model: type[BaseModel]) -> Callable[[list[Any]], bytes]:
    adapter = TypeAdapter(list[model])  # type: ignore[valid-type]

    def dump(items: list[Any]) -> bytes:
        return adapter.dump_json(adapter.validate_python(items, from_attributes=True), by_alias=True)

    return dump


_objects = TypeAdapter(list[dict[str, Any]])


def _column_dumper(statement: Select[Any]) -> Callable[[list[Any]], bytes]:
    names = list(_columns(statement))
    values: Callable[[Any], Any] = attrgetter(*names) if _entity(statement) is not None else _same

    def dump(items: list[Any]) -> bytes:
        if len(names) == 1:
            return _objects.dump_json([{names[0]: values(item)} for item in items])
        return _objects.dump_json([dict(zip(names, values(item), strict=True)) for item in items])

    return dump


def _same(item: Any) -> Any:
    return item


def _columns(statement: Select[Any]) -> dict[str, Any]:
    """Return the types of a row's columns by their names."""
    entity = _entity(statement)
    if entity is not None:
        attributes = inspect(entity).mapper.column_attrs
        return {each.key: each.columns[0].type for each in attributes if not each.deferred}
    columns = {each["name"]: each["type"] for each in statement.column_descriptions}
    if any(name is None or name.startswith("_no_label") for name in columns):
        raise PageError("A column of the statement has no name: give it one with label().")
    return columns


def _entity(statement: Select[Any]) -> Any:
    """Return the one entity whose rows these are, if they are an entity's."""
    selected = statement.column_descriptions
    entities = [each["expr"] for each in selected if each["expr"] is each.get("entity")]
    if entities and len(selected) > 1:
        raise PageError(
            "Rows of entities and more have no columns of their own: pass a model with a field for each, or select "
            "the columns."
        )
    return entities[0] if entities else None


# From a JSON array to lines


_apart = msgspec.json.Decoder(list[msgspec.Raw])


def _ndjson(array: bytes) -> bytes:
    return b"\n".join([*_apart.decode(array), b""])


def _csv_rows(names: Sequence[str], array: bytes) -> bytes:
    return _csv([_cell(name, row.get(name)) for name in names] for row in from_json(array))


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


#: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = re.compile(r"[=+\-@＝＋－＠\t\r\n\0]")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def _cell(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        raise _not_flat([name])
    return value


def _cells_of_statement(statement: Select[Any]) -> list[str]:
    columns = _columns(statement)
    # JSON, ARRAY and HSTORE, which a decorator may stand around.
    if nested := [name for name, type_ in columns.items() if isinstance(getattr(type_, "impl", type_), Indexable)]:
        raise _not_flat(nested)
    return list(columns)


@lru_cache
def _cells_of_model(model: type[BaseModel]) -> list[str]:
    # What serializers and aliases make of the fields is known to the schema alone.
    schema = TypeAdapter(model).json_schema(mode="serialization")
    definitions = schema.get("$defs", {})
    fields = _resolved(schema, definitions).get("properties", {})
    if nested := [name for name, field in fields.items() if _is_nested(field, definitions)]:
        raise _not_flat(nested)
    return list(fields)


def _is_nested(schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    schema = _resolved(schema, definitions)
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return schema.get("type") in ("object", "array") or any(_is_nested(each, definitions) for each in alternatives)


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def _not_flat(names: list[str]) -> PageError:
    return PageError(
        f"A cell of CSV holds one value, and these columns hold objects or lists: {', '.join(names)}. Pass a model "
        'without them, or write format="ndjson".'
    )
