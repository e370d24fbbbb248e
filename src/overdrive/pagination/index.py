"""The index that gives a page's rows in their order: the columns its filters fix, then its order keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Dialect, Select, Table, TypeCoerce
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ColumnClause,
    ColumnElement,
    False_,
    True_,
)
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import Boolean

from overdrive.errors import PageError

from .order import _order, default_nulls_first, flat, is_distinct_on

#: PostgreSQL: NAMEDATALEN less its terminator; SQLite has no such limit.
_LONGEST_NAME = 63


@dataclass(frozen=True, slots=True)
class Index:
    """An index that is wanted.

    keys: the SQL of its keys, each with its direction where that is not the default.
    order: the ORDER BY that it is for, as text.
    filters: columns the statement sets equal to a value, each with that value's parameter or constant.
    """

    table: Table
    keys: tuple[str, ...]
    order: str
    filters: tuple[tuple[Column[Any], ColumnElement[Any]], ...]

    def __str__(self) -> str:
        return f"one on {self.table.name} ({', '.join(self.keys)})"

    def ddl(self, dialect: Dialect, *, concurrently: bool = False, use_schema: bool = True) -> str:
        """Return the SQL that makes the index."""
        words = re.findall(r"\w+", " ".join((self.table.name, *self.keys)))
        name = dialect.identifier_preparer.quote(f"ix_{'_'.join(words)}"[:_LONGEST_NAME])
        table = dialect.identifier_preparer.format_table(self.table, use_schema=use_schema)
        create = "CREATE INDEX CONCURRENTLY" if concurrently else "CREATE INDEX"
        return f"{create} {name} ON {table} ({', '.join(self.keys)})"


def index_for(stmt: Any, dialect: Dialect) -> Index | str | None:
    """Return the index from which a page of `stmt` is read without sorting; or why no index can do that.

    None is for an order by primary key alone, which has its index.
    """
    if not isinstance(stmt, Select):
        return "a union has rows of several tables"
    if stmt._group_by_clauses or stmt._distinct or is_distinct_on(stmt):
        return "its rows are grouped (GROUP BY or DISTINCT) before they are ordered"
    try:
        orders = [_order(clause, stmt) for clause in flat(stmt._order_by_clauses)]
    except PageError:
        return "its ORDER BY is text"
    orders = [(_stored(expression), descending, nulls_first) for expression, descending, nulls_first in orders]
    tables = {table for expression, _, _ in orders for table in _tables_of(expression)}
    if len(tables) != 1:
        names = " and ".join(sorted(map(str, tables))) or "no table"
        return f"it is ordered by columns of {names}, and an index has those of one table"
    source = tables.pop()
    table = getattr(source, "element", source)
    if not isinstance(table, Table):
        return f"it is ordered by columns of {source}, which is no table"

    filters = {column: value for column, value in _fixed(stmt) if column.table is source}
    if not filters and {expression for expression, _, _ in orders[: len(table.primary_key)]} == {
        source.c[column.key] for column in table.primary_key
    }:
        return None
    # A fixed column has one value, and orders nothing.
    ordered = [each for each in orders if each[0] not in filters]
    # An index is read in both directions: ascending is how most are declared.
    backward = bool(ordered) and ordered[0][1]
    columns = [_sql(column, dialect) for column in filters]
    keys = [_key(*each, backward, dialect) for each in ordered]
    return Index(
        table,
        tuple(dict.fromkeys(columns + keys)),
        ", ".join(_key(*each, False, dialect) for each in orders),
        tuple(filters.items()),
    )


def _stored(expression: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the expression without what only tells Python how to read it."""
    while isinstance(expression, TypeCoerce):
        expression = expression.clause
    return expression._deannotate()


def _tables_of(expression: ColumnElement[Any]) -> Iterator[Any]:
    return (each.table for each in iterate(expression) if isinstance(each, ColumnClause))


def _fixed(stmt: Select[Any]) -> Iterator[tuple[Column[Any], ColumnElement[Any]]]:
    """Yield the columns that each row has to have one value in, and that value."""
    for term in _terms(stmt._where_criteria):
        if isinstance(term, Column) and isinstance(term.type, Boolean):
            yield term._deannotate(), True_._singleton
        elif isinstance(term, BinaryExpression):
            constant = isinstance(term.right, (True_, False_))
            equals = term.operator is operators.eq or (term.operator is operators.is_ and constant)
            if equals and isinstance(term.left, Column) and (constant or isinstance(term.right, BindParameter)):
                yield term.left._deannotate(), term.right


def _terms(criteria: Any) -> Iterator[Any]:
    for criterion in criteria:
        if isinstance(criterion, BooleanClauseList) and criterion.operator is operators.and_:
            yield from _terms(criterion)
        else:
            yield criterion


def _key(
    expression: ColumnElement[Any], descending: bool, nulls_first: bool | None, backward: bool, dialect: Dialect
) -> str:
    if nulls_first is None:
        nulls_first = default_nulls_first(descending, dialect.name)
    if backward:
        descending, nulls_first = not descending, not nulls_first
    words = [_sql(expression, dialect), "DESC" if descending else ""]
    # SQLite's indexes have NULLs in one place, and it can read them from the other.
    if dialect.name != "sqlite" and nulls_first != default_nulls_first(descending, dialect.name):
        words.append("NULLS FIRST" if nulls_first else "NULLS LAST")
    return " ".join(filter(None, words))


def _sql(expression: ColumnElement[Any], dialect: Dialect) -> str:
    compiler: Any = dialect.statement_compiler(dialect, None)
    sql: str = compiler.process(expression, include_table=False, literal_binds=True)
    return sql if isinstance(expression, Column) else f"({sql})"
