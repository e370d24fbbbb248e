"""Which rows a statement reads or writes, where it says so by their primary key.

A row has a tag of its own beside its table's. What read a row depends on that row, and on writes of which nobody knows
the rows; what read a table depends on all of it. So a write stamps the table, and besides either the rows it names
or, by the table's tag of unknown rows, all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Delete, Insert, Integer, Join, Select, Table, Update, Uuid
from sqlalchemy.exc import NoReferenceError
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import AliasedReturnsRows

from overdrive.context import OF_ROWS

#: Rows of one table beyond which all of it is meant.
MOST = 50

_AGGREGATES = frozenset((
    "array_agg",
    "avg",
    "bool_and",
    "bool_or",
    "count",
    "group_concat",
    "json_agg",
    "jsonb_agg",
    "max",
    "min",
    "string_agg",
    "sum",
    "total",
))  # fmt: skip

_CHANGING = frozenset(("CASCADE", "SET NULL", "SET DEFAULT"))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table, by their primary key.

    table: its full name.
    names: for each column of the key, in the order of the columns' names, the parameter with its value.
    types: the type of each value. Values of other types may be equal without looking alike.
    """

    table: str
    names: tuple[str, ...]
    types: tuple[type, ...]

    def tags(self, parameters: Sequence[Mapping[str, Any]]) -> frozenset[str] | None:
        """Return a tag for each row; None where a value is not what it should be, or there are too many."""
        if not 0 < len(parameters) <= MOST:
            return None
        tags = set()
        for each in parameters:
            values = [each.get(name) for name in self.names]
            if tuple(map(type, values)) != self.types:
                return None
            tags.add(tag_of_row(self.table, values))
        return frozenset(tags)


def tag_of_row(table: str, key: list[Any]) -> str:
    """Return the tag of a row.

    key: its values in the order of their columns' names, which the database and models agree on.

    There are 65,536 tags a table, as stores remember them: some rows share theirs.
    """
    return f"{table}{OF_ROWS}{blake2b(repr(key).encode(), digest_size=2).hexdigest()}"


def key_of(table: Table) -> list[Column[Any]] | None:
    """Return the columns whose values tell the rows of a table apart, in the order of their names."""
    columns = sorted(table.primary_key, key=lambda column: column.name)
    return columns if columns and all(_type_of(column) for column in columns) else None


def condensed(tags: Collection[str]) -> set[str]:
    """Return tags that mean as much, or more, with no more than a few rows of any table."""
    rows: dict[str, set[str]] = {}
    for tag in tags:
        rows.setdefault(tag.partition(OF_ROWS)[0], set()).add(tag)
    return {each for table, own in rows.items() for each in (own if len(own) <= MOST else _of_all(table))}


def _of_all(table: str) -> tuple[str, str]:
    return table, table + OF_ROWS


def rows_read(statement: Any, elements: Sequence[Any], names: Mapping[Any, str]) -> tuple[Rows, ...]:
    """Return the rows that a SELECT reads of tables of which it reads nothing else.

    elements: all there is in the statement.
    names: of its parameters.
    """
    if not isinstance(statement, Select) or sum(isinstance(element, Select) for element in elements) > 1:
        return ()
    # Without groups an aggregate gives a row where there is none, and so nobody sees that there is none.
    if not statement._group_by_clauses and (statement._having_criteria or any(map(_is_aggregate, elements))):
        return ()
    found = (_rows(table, statement._where_criteria, names) for table in _tables(statement.get_final_froms()))
    # Under another name, other rows of the same table are read.
    aliased = {getattr(each.element, "fullname", None) for each in elements if isinstance(each, AliasedReturnsRows)}
    return tuple(rows for rows in found if rows is not None and rows.table not in aliased)


def rows_written(statement: Any, names: Mapping[Any, str], keys: Iterable[str]) -> Rows | None:
    """Return the rows that an UPDATE or DELETE writes; None where it does not name them, or changes their key.

    keys: names of the columns whose values come with the parameters.
    """
    table = getattr(statement, "table", None)
    if not isinstance(statement, Update | Delete) or not isinstance(table, Table):
        return None
    if isinstance(statement, Update) and not _columns_set(statement, keys).isdisjoint(table.primary_key.columns.keys()):
        return None
    return _rows(table, statement._where_criteria, names)


def table_of(statement: Any) -> Any:
    """Return what a statement writes to, whatever it is called there."""
    table = getattr(statement, "table", None)
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    return table


def changes(statement: Any, keys: Iterable[str]) -> Iterator[tuple[str, frozenset[str] | None]]:
    """Yield the table that a statement writes to with the names of the columns that it sets; None where rows go."""
    table = table_of(statement)
    if not isinstance(table, Table):
        return
    # SQLite's OR REPLACE deletes what is in the way.
    if isinstance(statement, Delete) or statement._prefixes:
        yield table.fullname, None
    if isinstance(statement, Delete):
        return
    changed = _columns_set(statement, keys) if isinstance(statement, Update) else _columns_replaced(statement)
    yield table.fullname, frozenset(table.c[key].name if key in table.c else key for key in changed)


def changed_along(statement: Any, keys: Iterable[str]) -> frozenset[str]:
    """Return the tables whose rows the database changes along with what is written, by foreign keys."""
    table = table_of(statement)
    if not isinstance(table, Table):
        return frozenset()
    if isinstance(statement, Update):
        return frozenset(_updated_along(table, _columns_set(statement, keys), set()))
    if isinstance(statement, Insert):
        along = frozenset(_updated_along(table, _columns_replaced(statement), set()))
        # SQLite's OR REPLACE deletes what is in the way.
        return along | frozenset(_deleted_along(table, set())) if statement._prefixes else along
    return frozenset(_deleted_along(table, set()))


def _deleted_along(table: Table, seen: set[Any]) -> Iterator[str]:
    for other, key in _references(table):
        action = _action(key.ondelete)
        if action is None or key in seen:
            continue
        seen.add(key)
        yield other.fullname
        yield from _deleted_along(other, seen) if action == "CASCADE" else _updated_along(other, {key.parent.key}, seen)


def _updated_along(table: Table, changed: Collection[str], seen: set[Any]) -> Iterator[str]:
    for other, key in _references(table):
        # A column may be changed where its row is not deleted, and by several ways.
        if key.column.key in changed and _action(key.onupdate) is not None and (key, "updated") not in seen:
            seen.add((key, "updated"))
            yield other.fullname
            yield from _updated_along(other, {key.parent.key}, seen)


def _action(rule: str | None) -> str | None:
    """Return what a foreign key does to its row, if anything; it may name columns (PostgreSQL 15)."""
    action = (rule or "").partition("(")[0].strip().upper()
    return action if action in _CHANGING else None


def _references(table: Table) -> Iterator[tuple[Table, Any]]:
    for other in table.metadata.tables.values():
        for key in other.foreign_keys:
            try:
                refers = key.column.table.fullname == table.fullname
            except NoReferenceError:
                continue
            if refers:
                yield other, key


def _columns_set(statement: Update, keys: Iterable[str]) -> set[str]:
    given: list[Any] = [*keys, *(statement._values or ())]
    # SQLAlchemy 2.0 keeps those of ordered_values() apart.
    given += [column for column, _ in getattr(statement, "_ordered_values", None) or ()]
    return {getattr(each, "key", each) for each in given}


def _columns_replaced(statement: Any) -> set[str]:
    """Return what an INSERT sets where its row is there already."""
    upsert = getattr(statement, "_post_values_clause", None)
    # SQLAlchemy 2.0 has pairs there.
    set_: dict[Any, Any] = dict(getattr(upsert, "update_values_to_set", ()))
    return {getattr(each, "key", each) for each in set_}


def _is_aggregate(element: Any) -> bool:
    return isinstance(element, FunctionElement) and element.name.lower() in _AGGREGATES


def _tables(sources: Iterable[Any]) -> Iterator[Table]:
    for source in sources:
        if isinstance(source, Join):
            yield from _tables((source.left, source.right))
        elif isinstance(source, Table):
            yield source


def _rows(table: Table, criteria: Iterable[Any], names: Mapping[Any, str]) -> Rows | None:
    """Return the rows that all of the criteria leave of a table, if they give its whole key."""
    equal: dict[str, str] = {}
    for column, parameter in _equalities(criteria):
        if table.c.contains_column(column) and parameter in names:
            equal[column.key] = names[parameter]
    key = key_of(table)
    if key is None or not all(column.key in equal for column in key):
        return None
    types = (_type_of(column) for column in key)
    return Rows(table.fullname, tuple(equal[each.key] for each in key), tuple(type_ for type_ in types if type_))


def _equalities(criteria: Iterable[Any]) -> Iterator[tuple[Any, BindParameter[Any]]]:
    """Yield the columns that have to be equal to a parameter."""
    for criterion in criteria:
        if isinstance(criterion, BooleanClauseList) and criterion.operator is operators.and_:
            yield from _equalities(criterion.clauses)
        elif isinstance(criterion, BinaryExpression) and criterion.operator is operators.eq:
            for column, value in ((criterion.left, criterion.right), (criterion.right, criterion.left)):
                if isinstance(value, BindParameter) and not value.expanding:
                    yield column, value


def _type_of(column: ColumnElement[Any]) -> type | None:
    """Return the type of a column's values, where equal values are the same, whatever the collation."""
    # A TypeDecorator is neither: it may make the same of different values.
    if isinstance(column.type, Integer):
        return int
    return UUID if isinstance(column.type, Uuid) and column.type.as_uuid else None
