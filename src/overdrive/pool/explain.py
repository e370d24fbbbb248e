"""Plans of statements that were sent: whether a page had to be sorted, and whether an index would have saved that.

Databases are asked by EXPLAIN, which runs nothing. Small tables are sorted whatever indexes they have, so two more
questions are asked: does PostgreSQL still sort with sorting forbidden; and, where it does, is an empty copy of the
tables sorted as well, without the index that is wanted and with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    FromClause,
    NullPool,
    Select,
    SingletonThreadPool,
    StaticPool,
    Table,
    TableClause,
    create_engine,
    event,
    literal,
    literal_column,
    select,
    text,
)
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import AliasedReturnsRows
from sqlalchemy.sql.visitors import iterate

from overdrive.context import current
from overdrive.errors import ConfigurationError

T = TypeVar("T")

# Reading only


#: What closes a connection to writes, and what opens it again.
_SWITCHES = {
    "postgresql": ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
    "sqlite": ("PRAGMA query_only = ON", "PRAGMA query_only = OFF"),
}


@asynccontextmanager
async def read_only() -> AsyncIterator[None]:
    """Have databases refuse every write in the block, and keep nothing: of every engine in this process.

    What is sent past SQLAlchemy, or on a connection that was in use before the block, is not seen.
    """
    engines: set[Engine] = set()

    def close_to_writes(connection: Connection) -> None:
        name = connection.dialect.name
        if name not in _SWITCHES:
            raise ConfigurationError(f"statements are explained on {' and '.join(_SWITCHES)}, not {name}")
        engines.add(connection.engine)
        _switch(connection, _SWITCHES[name][0])

    event.listen(Engine, "engine_connect", close_to_writes)
    event.listen(Engine, "commit", _roll_back)
    try:
        yield
    finally:
        event.remove(Engine, "engine_connect", close_to_writes)
        event.remove(Engine, "commit", _roll_back)
        for engine in engines:
            await _open_to_writes(engine)


async def _open_to_writes(engine: Engine) -> None:
    # A connection may be given back where nothing can be sent, so all of them are closed, but for a database in memory.
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        await on_connection(engine, lambda connection: _switch(connection, _SWITCHES[engine.dialect.name][1]))
    elif engine.dialect.is_async:
        await AsyncEngine(engine).dispose()
    else:
        engine.dispose()


async def on_connection(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Do something with a connection of any engine."""
    if not engine.dialect.is_async:
        with engine.connect() as connection:
            return work(connection)
    async with AsyncEngine(engine).connect() as connection:
        return await connection.run_sync(work)


def _switch(connection: Connection, sql: str) -> None:
    dbapi_connection: Any = connection.connection.dbapi_connection
    cursor = dbapi_connection.cursor()
    cursor.execute(sql)
    cursor.close()
    # What a transaction has set ends with it.
    dbapi_connection.commit()


def _roll_back(connection: Connection) -> None:
    """Leave nothing for the COMMIT that follows: a NOTIFY, a lock and a temporary table are no writes."""
    connection.dialect.do_rollback(connection.connection)


# Statements


@dataclass(frozen=True, slots=True)
class Sent:
    """A statement as it was sent.

    sql, parameters: as the driver was given them.
    statement: as SQLAlchemy compiled it; the one it was given where it put that into a subquery, which `nested` says.
    values: the values of the statement's parameters, by their names.
    """

    engine: Engine
    sql: str
    parameters: Any
    statement: Any
    nested: bool
    values: Mapping[Any, Any]


@contextmanager
def sent_pages() -> Iterator[list[Sent]]:
    """Record the statements with a LIMIT that requests send for their page."""
    sent: list[Sent] = []

    def note(
        connection: Connection, _cursor: Any, sql: str, parameters: Any, context: ExecutionContext, _many: bool
    ) -> None:
        request, given = current(), getattr(context, "invoked_statement", None)
        # `page_style` is set when the page is begun.
        if request is None or request.page_style is None or getattr(given, "_limit_clause", None) is None:
            return
        compiled: Any = context.compiled
        whole: Any = compiled.compile_state.statement if compiled.compile_state is not None else given
        nested = whole._limit_clause is None
        named: dict[str, Any] = context.compiled_parameters[0]  # type: ignore[attr-defined]
        values = {bind.key: named[name] for bind, name in compiled.bind_names.items() if name in named}
        sent.append(Sent(connection.engine, sql, parameters, given if nested else whole, nested, values))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


# Plans


def sort_line(connection: Connection, sent: Sent) -> str | None:
    """Return the line of the statement's plan that sorts, where no index of its tables could save that."""
    if connection.dialect.name == "sqlite":
        return _sqlite_sort(connection, sent)
    # As it is, for the line; then with all that sorts forbidden.
    as_it_is = _unbounded_sort(_plan(connection, sent))
    if as_it_is is None:
        return None
    with _sorting_forbidden(connection):
        forbidden = _unbounded_sort(_plan(connection, sent))
    if forbidden is None or _is_unique_before(connection, forbidden):
        return None
    return _sort_text(as_it_is)


def _plan(connection: Connection, sent: Sent) -> Any:
    answer = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sent.sql}", sent.parameters).scalar_one()
    return _root(answer)


def _root(answer: Any) -> Any:
    return (json.loads(answer) if isinstance(answer, str) else answer)[0]["Plan"]


@contextmanager
def _sorting_forbidden(connection: Connection) -> Iterator[None]:
    savepoint = connection.begin_nested()
    for setting in ("seqscan", "bitmapscan", "sort", "hashjoin", "mergejoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{setting} = off")
    yield
    savepoint.rollback()


def _unbounded_sort(node: Any) -> Any:
    """Return the node that puts the page's rows in order by sorting more than a page of them.

    An order comes from a node's first input, but for a union's, which has one of each.
    """
    inputs = _inputs(node)
    if node["Node Type"] in ("Sort", "Incremental Sort") and not all(map(_is_bounded, inputs)):
        return node
    return next(filter(None, map(_unbounded_sort, inputs)), None)


def _is_bounded(node: Any) -> bool:
    inputs = _inputs(node)
    return node["Node Type"] == "Limit" or (bool(inputs) and all(map(_is_bounded, inputs)))


def _inputs(node: Any) -> list[Any]:
    inputs = [each for each in node.get("Plans", ()) if each["Parent Relationship"] not in ("InitPlan", "SubPlan")]
    return inputs if node["Node Type"] in ("Append", "Merge Append") else inputs[:1]


def _is_unique_before(connection: Connection, sort: Any) -> bool:
    """Say whether rows come from a unique index, so that sorting those that are equal in it sorts nothing."""
    scan = _scan_of(sort)
    if "Presorted Key" not in sort or "Index Name" not in scan:
        return False
    keys = connection.execute(
        text(
            "SELECT max(CASE WHEN indisunique AND attnotnull THEN indnkeyatts ELSE 1000 END) "
            "FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
            "JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey) WHERE relname = :name"
        ),
        {"name": scan["Index Name"]},
    ).scalar_one()
    return keys is not None and bool(keys <= len(sort["Presorted Key"]))


def _scan_of(node: Any) -> Any:
    while inputs := _inputs(node):
        node = inputs[0]
    return node


def _sort_text(node: Any) -> str:
    text = f"{node['Node Type']}  (rows={_inputs(node)[0]['Plan Rows']})  Sort Key: {', '.join(node['Sort Key'])}"
    if "Presorted Key" in node:
        text += f"  Presorted Key: {', '.join(node['Presorted Key'])}"
    return text


def _sqlite_sort(connection: Connection, sent: Sent) -> str | None:
    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sent.sql}", sent.parameters).all()
    details: dict[int, str] = {row[0]: row[3] for row in rows}
    parents = {row[0]: row[1] for row in rows}

    def above(row_id: int) -> Iterator[str]:
        while row_id := parents[row_id]:
            yield details[row_id]

    for row_id, detail in details.items():
        if re.match("USE TEMP B-TREE FOR .*ORDER BY", detail):
            outside = list(above(row_id))
            # The order of a subquery that is a value is not the page's; nor is what is outside of the page's own.
            inside = any(each.startswith("CO-ROUTINE") for each in outside)
            if not any("SUBQUERY" in each for each in outside) and (inside or not sent.nested):
                return detail
    return None


# Filters


#: Rows read for one page that are many, and as a multiple of the page.
_MANY = 1_000
_TIMES = 10

#: Columns of one table that a statement sets equal to a value, each with that value as an element of SQL.
Filters = Sequence[tuple[Column[Any], ColumnElement[Any]]]


def waste_line(connection: Connection, sent: Sent, filters: Filters) -> str | None:
    """Return the line of the statement's plan that reads many rows in order to throw away those it filters out.

    That is by PostgreSQL's statistics; SQLite has none of columns without an index.
    """
    missed, scan = _missed(connection, sent, filters)
    if not missed or not _is_analyzed(connection, missed[0][0].table):
        return None
    met = [each for each in filters if each not in missed]
    table = missed[0][0].table
    in_reach, wanted = (_estimate(connection, table, each, sent.values) for each in (met, filters))
    page = sent.values[sent.statement._limit_clause.key]
    read: int = min(in_reach, page * in_reach // wanted)
    if read < max(_MANY, _TIMES * page):
        return None
    return f"{scan['Node Type']} using {scan['Index Name']}  Filter: {scan['Filter']}  (reads {read:,} rows for {page})"


def is_served(connection: Connection, sent: Sent, filters: Filters) -> bool:
    """Say whether an index can give the statement's rows in order, and only those with the filters' values."""
    return sort_line(connection, sent) is None and not _missed(connection, sent, filters)[0]


def _missed(connection: Connection, sent: Sent, filters: Filters) -> tuple[Filters, Any]:
    """Return the filters that are compared row by row, and the node that does so."""
    # Of a statement in a subquery, the values are not known.
    if connection.dialect.name != "postgresql" or sent.nested or not filters:
        return [], None
    with _sorting_forbidden(connection):
        scan = _scan_of(_plan(connection, sent))
    return [each for each in filters if _is_named(each[0], scan.get("Filter", ""))], scan


def _is_named(column: Column[Any], condition: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(column.name)}(?!\w)", condition) is not None


class _Explain(Executable, ClauseElement):
    inherit_cache = False

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement


@compiles(_Explain)
def _explain(element: _Explain, compiler: Any, **options: Any) -> str:
    return f"EXPLAIN (FORMAT JSON) {compiler.process(element.statement, **options)}"


def _estimate(connection: Connection, table: FromClause, filters: Filters, values: Mapping[Any, Any]) -> int:
    """Return how many rows PostgreSQL expects to have these values."""
    stmt: Select[Any] = select(literal_column("1")).select_from(table)
    for column, value in filters:
        known = literal(values[value.key], value.type) if isinstance(value, BindParameter) else value
        stmt = stmt.where(column == known)
    rows: int = _root(connection.execute(_Explain(stmt)).scalar_one())["Plan Rows"]
    return rows


def _is_analyzed(connection: Connection, table: FromClause) -> bool:
    base: Any = table.element if isinstance(table, AliasedReturnsRows) else table
    return bool(_catalogued(connection, base, "reltuples") > 0)


# Tables


def kind_of(connection: Connection, table: Table) -> str:
    """Return what a table's name stands for: "table", "partitioned table", or "view" for what has no indexes."""
    if connection.dialect.name == "sqlite":
        query = "SELECT type FROM sqlite_master WHERE name = ?"
        return connection.exec_driver_sql(query, (table.name,)).scalar_one_or_none() or "view"
    return {"r": "table", "m": "table", "p": "partitioned table"}.get(_catalogued(connection, table, "relkind"), "view")


def _catalogued(connection: Connection, table: Table, column: str) -> Any:
    name = connection.dialect.identifier_preparer.format_table(table)
    value = connection.execute(text(f"SELECT {column} FROM pg_class WHERE oid = to_regclass(:name)"), {"name": name})
    # asyncpg reads PostgreSQL's "char" as bytes.
    found = value.scalar_one_or_none()
    return found.decode() if isinstance(found, bytes) else found


@contextmanager
def empty_copy(connection: Connection, pages: Sequence[Sent]) -> Iterator[tuple[Connection, list[Sent]]]:
    """Make empty copies of the statements' tables, with their indexes; yield where, and the statements for them.

    On PostgreSQL they are temporary tables in a transaction that is rolled back: they take no lock that others wait
    for, and wait themselves a second at most. Of SQLite they are in memory.

    Raises SQLAlchemy's `DBAPIError` where the database refuses them.
    """
    connection.rollback()
    if connection.dialect.name == "sqlite":
        with _copy_in_memory(connection) as copy:
            yield copy, list(pages)
        return
    tables = {
        each.fullname: each for page in pages for each in iterate(page.statement) if isinstance(each, TableClause)
    }
    try:
        connection.exec_driver_sql("SET TRANSACTION READ WRITE")
        connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
        names = dict(_copied(connection, tables.values()))
        # A team may have put the temporary tables last.
        path = "SELECT set_config('search_path', 'pg_temp, ' || current_setting('search_path'), true)"
        connection.exec_driver_sql(path)
        yield connection, [replace(page, sql=_renamed(page.sql, names)) for page in pages]
    finally:
        connection.rollback()


def _copied(connection: Connection, tables: Iterable[TableClause]) -> Iterator[tuple[str, str]]:
    preparer = connection.dialect.identifier_preparer
    for table in tables:
        name, copy = preparer.format_table(table), f"pg_temp.{preparer.quote(table.name)}"
        like = f"LIKE {name} INCLUDING INDEXES INCLUDING GENERATED"
        connection.exec_driver_sql(f"CREATE TEMPORARY TABLE {copy} ({like})")
        yield name, copy


def _renamed(sql: str, names: Mapping[str, str]) -> str:
    for name, copy in names.items():
        # Without a schema, the name finds the copy as it is.
        if "." in name:
            sql = re.sub(rf'(?<![\w".]){re.escape(name)}(?![\w"])', copy, sql)
    return sql


@contextmanager
def _copy_in_memory(connection: Connection) -> Iterator[Connection]:
    schema = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE type IN ('table', 'index', 'view') AND sql IS NOT NULL ORDER BY rowid"
    )
    engine = create_engine("sqlite://", poolclass=NullPool)
    try:
        with engine.connect() as copy:
            copy.exec_driver_sql("PRAGMA query_only = OFF")
            for sql in schema.scalars():
                # Some tables come with others.
                with suppress(DBAPIError):
                    copy.exec_driver_sql(sql)
            yield copy
    finally:
        engine.dispose()
