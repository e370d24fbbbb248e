"""The order of a statement's rows: its keys, what makes it unique, and which of them may be NULL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    REAL,
    Column,
    CompoundSelect,
    Double,
    Float,
    Interval,
    Join,
    Label,
    Numeric,
    Select,
    Table,
    Text,
    TypeDecorator,
    cast,
    type_coerce,
)
from sqlalchemy.orm import lazyload
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BooleanClauseList,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    UnaryExpression,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import cube, grouping_sets, rollup
from sqlalchemy.sql.selectable import AliasedReturnsRows, FromClause
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeEngine, UserDefinedType

from overdrive.errors import PageError

from . import keyset

#: Whether NULL sorts above every value where ORDER BY does not say, by SQLAlchemy's name of the dialect.
#: PostgreSQL: "Sorting Rows"; SQLite: "SELECT", the ORDER BY clause.
_NULLS_LARGEST = {"postgresql": True, "sqlite": False}


# The order of a walk


@dataclass(frozen=True, slots=True)
class Sort:
    """One order key.

    expression: what is ordered and compared, as `_exact` types it.
    selected: what is read of it for a cursor; mostly itself.
    python_type: of what is read, as `cursor.encode` wants it.
    """

    expression: ColumnElement[Any]
    selected: ColumnElement[Any]
    python_type: type
    key: keyset.Key


def sorts_of(stmt: Select[Any], dialect_name: str) -> list[Sort]:
    """Return the keys a statement is ordered by, and after them those that make the order unique.

    Raises `PageError` where there are none, or an ORDER BY clause is text.
    """
    if dialect_name not in _NULLS_LARGEST:
        raise PageError(f"Cursor pages are for {' and '.join(_NULLS_LARGEST)}, not {dialect_name}: use Page.")
    tables = dict(_tables(stmt))
    orders = [_order(clause, stmt) for clause in flat(stmt._order_by_clauses)]
    ordered = {expression for expression, _, _ in orders}
    # In the last key's direction, so that an index of one direction serves the whole order.
    descending = bool(orders) and orders[-1][1]
    orders += [(column, descending, None) for column in _tie_break(stmt) if column not in ordered]
    if stmt._distinct:
        _require_selected([expression for expression, _, _ in orders], stmt)
    return [
        _sort(expression, descending, nulls_first, tables, dialect_name)
        for expression, descending, nulls_first in orders
    ]


def _tie_break(stmt: Select[Any]) -> list[ColumnElement[Any]]:
    identity = identity_of(stmt)
    if not identity:
        raise PageError(
            "Nothing tells the statement's rows apart where their order keys are equal. Select from tables "
            "with a primary key, and find the rows of anything else by "
            "select(Entity).where(Entity.id.in_(...)); or use Page."
        )
    return identity


def _require_selected(expressions: list[ColumnElement[Any]], stmt: Select[Any]) -> None:
    selected = [_unlabelled(column) for column in stmt.selected_columns]
    for expression in expressions:
        if not any(expression.compare(column) for column in selected):
            raise PageError(f"With DISTINCT, rows are ordered by what is selected: select {expression} too.")


def flat(clauses: Any) -> Iterator[Any]:
    """Yield the clauses of nested lists of them."""
    for clause in clauses:
        # A composite attribute is the list of its columns.
        if isinstance(clause, ColumnElement) or not hasattr(clause, "clauses"):
            yield clause
        else:
            yield from flat(clause.clauses)


def _order(clause: Any, stmt: Select[Any]) -> tuple[ColumnElement[Any], bool, bool | None]:
    """Take an ORDER BY clause apart: the expression, whether descending, and where NULLs were told to go."""
    descending, nulls_first = False, None
    while True:
        if isinstance(clause, UnaryExpression) and clause.modifier in _MODIFIERS:
            descending = descending or clause.modifier is operators.desc_op
            if clause.modifier in (operators.nulls_first_op, operators.nulls_last_op):
                nulls_first = clause.modifier is operators.nulls_first_op
            clause = clause.element
        elif isinstance(clause, (Label, _label_reference)):
            clause = clause.element
        elif isinstance(clause, _textual_label_reference):
            clause = _named(clause.element, stmt)
        else:
            break
    if not isinstance(clause, ColumnElement) or (isinstance(clause, ColumnClause) and clause.name.isdigit()):
        raise PageError(f"ORDER BY {clause} is text, not a column: order by a column or an expression.")
    return clause, descending, nulls_first


_MODIFIERS = (operators.asc_op, operators.desc_op, operators.nulls_first_op, operators.nulls_last_op)


def _named(name: str, stmt: Select[Any]) -> ColumnElement[Any]:
    for columns in (stmt.selected_columns, *(table.c for table, _ in _tables(stmt))):
        if name in columns:
            return columns[name]
    raise PageError(f"ORDER BY {name!r} names no column: order by a column or an expression.")


def _sort(
    expression: ColumnElement[Any],
    descending: bool,
    nulls_first: bool | None,
    tables: dict[FromClause, bool],
    dialect_name: str,
) -> Sort:
    if nulls_first is None:
        nulls_first = default_nulls_first(descending, dialect_name)
    key = keyset.Key(descending, nulls_first, _is_nullable(expression, tables))
    exact = _exact(expression, dialect_name)
    selected = cast(exact, exact.type.impl) if isinstance(exact.type, _Recast) else exact
    python_type = _python_type(exact.type)
    # A JSON null would be taken for the NULL that it is not.
    if isinstance(exact.type, JSON) or issubclass(python_type, list):
        raise PageError(
            f"ORDER BY {expression} puts a {type(exact.type).__name__} into the cursor: order by something in it, as "
            'in column["key"].as_string(), or by cast() of it to a plain type.'
        )
    return Sort(exact, selected, python_type, key)


def default_nulls_first(descending: bool, dialect_name: str) -> bool:
    """Say whether NULLs come first where ORDER BY does not tell."""
    return descending if _NULLS_LARGEST[dialect_name] else not descending


def _is_nullable(expression: ColumnElement[Any], tables: dict[FromClause, bool]) -> bool:
    if not isinstance(expression, Column) or expression.nullable:
        return True
    # A subquery's column may be called NOT NULL for what an outer join inside it has made NULL.
    table = expression.table
    is_table = isinstance(table, Table) or isinstance(getattr(table, "element", None), Table)
    return not is_table or tables.get(table, True)


class _Stored(UserDefinedType[Any]):
    """A value as SQLite stores it.

    SQLAlchemy reads '2026-01-01 00:00:00', which CURRENT_TIMESTAMP writes, and binds
    '2026-01-01 00:00:00.000000': another text, with which the row would not be found again. Likewise Numeric,
    which is stored as a float.
    """

    cache_ok = True


class _Recast(TypeDecorator[Any]):
    """A value that is read as another type, exactly, and cast back where it is compared, so that an index serves."""


class _Single(_Recast):
    """Drivers differ in whether they read single precision as the shortest decimal or as what it is."""

    impl = Double
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> ColumnElement[Any]:
        return cast(bindparam, REAL)


class _Span(_Recast):
    """Drivers read a year as 365 days; where PostgreSQL compares it, it has 360."""

    impl = Text
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> ColumnElement[Any]:
        return cast(bindparam, Interval)


def _exact(expression: ColumnElement[Any], dialect_name: str) -> ColumnElement[Any]:
    """Return the expression so typed that its values come back to the database as they were."""
    type_ = expression.type
    if dialect_name == "sqlite":
        return type_coerce(expression, _Stored())
    if isinstance(type_, Float) and (isinstance(type_, REAL) or (type_.precision or 53) < 25):
        # What is calculated of single precision may have become double.
        return type_coerce(expression, _Single()) if isinstance(expression, Column) else cast(expression, Double())
    if type_._type_affinity is Interval:
        return type_coerce(expression, _Span())
    # A Float read as Decimal, and a Numeric read as float, come back rounded.
    if isinstance(type_, Float) and type_.asdecimal:
        return type_coerce(expression, Float())
    if isinstance(type_, Numeric) and not isinstance(type_, Float) and not type_.asdecimal:
        return type_coerce(expression, Numeric())
    return expression


def _python_type(type_: TypeEngine[Any]) -> type:
    # A decorator's values are of a type it does not tell.
    if isinstance(type_, _Stored) or hasattr(type_, "process_result_value"):
        return object
    try:
        return type_.python_type
    except NotImplementedError:
        return object


def order_text(sorts: list[Sort]) -> str:
    """Describe an order: two that are described alike put the same rows in the same places."""
    return "\n".join(map(_sort_text, sorts))


def _sort_text(sort: Sort) -> str:
    compiled = sort.expression.compile()
    type_ = sort.expression.type
    # Whatever a deployment may change of a type that would make a value of before an error in the database.
    declared = type(type_).__name__, getattr(type_, "collation", None), getattr(type_, "enums", None)
    return f"{compiled} {compiled.params} {declared} {sort.python_type.__name__} {sort.key}"


# What tells rows apart


def identity_of(source: ClauseElement) -> list[ColumnElement[Any]] | None:
    """Return columns of which no two rows of `source` have the same values; None where none are known."""
    if isinstance(source, Table):
        return list(source.primary_key) or None
    if isinstance(source, Join):
        return _join_identity(source)
    if isinstance(source, AliasedReturnsRows):
        return _exported(source, identity_of(source.element))
    if isinstance(source, Select):
        return _select_identity(source)
    if isinstance(source, CompoundSelect) and "ALL" not in source.keyword.name:
        return list(source.selected_columns)
    return None


def _join_identity(join: Join) -> list[ColumnElement[Any]] | None:
    left, right = identity_of(join.left), identity_of(join.right)
    if left is None or right is None:
        return None
    # Joined on the whole identity of the right side, a row on the left finds one row at most.
    if not join.full and set(right) <= _equated(join):
        return left
    return left + right


def _equated(join: Join) -> set[ColumnElement[Any]]:
    """Return the right side's columns that the ON clause sets equal to the left side's."""
    clause = join.onclause
    terms = list(clause) if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_ else [clause]
    left, right = set(join.left.c), set(join.right.c)
    equated = set()
    for term in terms:
        if isinstance(term, BinaryExpression) and term.operator is operators.eq:
            for one, other in ((term.left, term.right), (term.right, term.left)):
                if one in right and other in left:
                    equated.add(one)
    return equated


def _exported(source: AliasedReturnsRows, columns: list[ColumnElement[Any]] | None) -> list[ColumnElement[Any]] | None:
    """Return the columns of an alias or a subquery that stand for the columns of what is inside."""
    outside = {_unlabelled(inside): column for column in source.c for inside in column._proxies}
    if columns is None or not all(column in outside for column in columns):
        return None
    return [outside[column] for column in columns]


def _select_identity(stmt: Select[Any]) -> list[ColumnElement[Any]] | None:
    if is_distinct_on(stmt):
        return None
    if stmt._distinct:
        return _distinct_identity(stmt)
    if stmt._group_by_clauses:
        # A rollup's groups may be equal to each other in all of its columns.
        if any(isinstance(part, _ROLLUPS) for clause in stmt._group_by_clauses for part in iterate(clause)):
            return None
        return [_order(clause, stmt)[0] for clause in flat(stmt._group_by_clauses)]
    columns: list[ColumnElement[Any]] = []
    for source in froms_of(stmt):
        identity = identity_of(source)
        if identity is None:
            return None
        columns += identity
    return columns or None


_ROLLUPS = (rollup, cube, grouping_sets)


def is_distinct_on(stmt: Select[Any]) -> bool:
    """Say whether the statement keeps one row of each group by DISTINCT ON."""
    # The second is where SQLAlchemy 2.1 keeps the extension `distinct_on()`.
    return bool(stmt._distinct_on) or getattr(stmt, "_pre_columns_clause", None) is not None


def _distinct_identity(stmt: Select[Any]) -> list[ColumnElement[Any]]:
    """Return the selected columns, but of a table whose identity is among them only that."""
    selected = [_unlabelled(column) for column in stmt.selected_columns]
    identities = {table: identity_of(table) for table, _ in _tables(stmt)}
    whole = {table: columns for table, columns in identities.items() if columns and set(columns) <= set(selected)}
    kept = [column for columns in whole.values() for column in columns]
    return kept + [column for column in selected if getattr(column, "table", None) not in whole]


def froms_of(stmt: Select[Any]) -> list[FromClause]:
    """Return what the statement selects from, without the joins that loading brings, which add no rows."""
    plain = stmt.order_by(None)
    plain._with_options = ()
    return list(plain.options(lazyload("*")).get_final_froms())


def _tables(stmt: Select[Any]) -> Iterator[tuple[FromClause, bool]]:
    """Yield each joined table, and whether an outer join may fill it with NULLs."""
    for source in froms_of(stmt):
        yield from _joined(source, False)


def _joined(source: FromClause, optional: bool) -> Iterator[tuple[FromClause, bool]]:
    if isinstance(source, Join):
        yield from _joined(source.left, optional or source.full)
        yield from _joined(source.right, optional or source.full or source.isouter)
    else:
        yield source, optional


def _unlabelled(column: Any) -> Any:
    return column.element if isinstance(column, Label) else column
