"""Sorting and filtering by the client: declared names, and the query parameters made of them.

An operator is a suffix, `created_at__gte=2024-01-31`, as Django spells it: it needs no percent-encoding, as the
brackets of JSON:API do, and every parameter is a plain name in the OpenAPI document. Lists are separated by commas,
as is the `sort` of JSON:API (https://jsonapi.org/format/#fetching-sorting).

Annotations here are read by FastAPI at run time, so this module does not postpone them.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from inspect import Parameter, Signature
from keyword import iskeyword
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from fastapi import Query
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field, NaiveDatetime, TypeAdapter
from pydantic_core import PydanticCustomError
from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    ColumnElement,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Numeric,
    Select,
    SmallInteger,
    SQLColumnExpression,
    String,
    TypeDecorator,
    UnaryExpression,
    Uuid,
    nulls_first,
    nulls_last,
    or_,
)
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeEngine

from .errors import ConfigurationError

#: The most of one request: names in `sort`, values in a list, characters in `q`.
MAX_SORTS = 3
MAX_VALUES = 100
MAX_SEARCH = 100

S = TypeVar("S", bound="Select[*tuple[Any, ...]]")

#: A column, or anything that is computed for each row.
Expression = SQLColumnExpression[Any]
Criterion = ColumnElement[bool]

# Two underscores are where an operator begins; the pages' own parameters are what cursors are not bound to.
_NAME = re.compile("[a-zA-Z](_?[a-zA-Z0-9])*")
_TAKEN = {"cursor", "limit", "offset", "page", "q", "size", "sort"}

# PostgreSQL's texts have no NUL.
_NO_NUL = r"^[^\x00]*$"


class _Sent(BaseModel, extra="allow"):
    """The whole query string; a name that was sent more than once has a list."""


class Listing:
    """What clients may sort and filter by; as a dependency, itself as one client asks for it.

    sort: the names to sort by, and the column or expression behind each. NULLs are where the database puts them,
        or in both directions where `.nulls_first()` or `.nulls_last()` of it says.
    default: the order where the client asks for none, spelled as a client would: `-created_at,name`.
    filters: the names to filter by, and the column or expression behind each. Its type decides what a client can
        send: `country=DE` always, `country__in=DE,FR` but for booleans, `__lt`, `__lte`, `__gt` and `__gte` for
        numbers and dates, `__isnull=true` for nullable columns.
    search: the columns of which one has to contain what the client sends as `q`, in any case; or a function from
        that text to a criterion, as for a full text search.

    A client sends up to 3 names in `sort`, 100 values in a list and 100 characters in `q`. What it sends under the
    declared names and cannot mean is a 422, as FastAPI answers for any parameter; other names belong to others.

    Raises `ConfigurationError` for a declaration that cannot work.
    """

    def __init__(
        self,
        *,
        sort: Mapping[str, Expression] | None = None,
        default: str | None = None,
        filters: Mapping[str, Expression] | None = None,
        search: Sequence[Expression] | Callable[[str], Criterion] = (),
    ) -> None:
        self._sorts = {_checked_name(name): _sortable(name, expression) for name, expression in (sort or {}).items()}
        self._filters = {
            each.name: each
            for name, expression in (filters or {}).items()
            for each in _filters(_checked_name(name), expression)
        }
        self._search = search if callable(search) or not search else _containing(search)
        self._where: list[Criterion] = []
        self._order_by = self._default_order(default)
        parameters = [*self._parameters(default)]
        self._names = {parameter.name for parameter in parameters}
        self.__signature__ = Signature([_parameter("_sent", _Sent, Query(), Parameter.empty), *parameters])

    async def __call__(
        self, _sent: _Sent, *, sort: str | None = None, q: str | None = None, **values: Any
    ) -> "Listing":
        """Return the listing as this client asks for it."""
        self._check_names(_sent.model_extra or {})
        asked = copy(self)
        asked._where = [self._filters[name].criterion(value) for name, value in values.items() if value is not None]
        if q is not None and callable(self._search):
            asked._where.append(self._search(q))
        if sort is not None:
            asked._order_by = self._order(sort)
        return asked

    def apply(self, statement: S) -> S:
        """Return the statement with what the client asks for; an ORDER BY it has already comes first."""
        return statement.where(*self._where).order_by(*self._order_by)

    # What a client may ask for

    def _default_order(self, default: str | None) -> list[ColumnElement[Any]]:
        if default is None:
            return []
        try:
            return self._order(self._checked_sort(default))
        except PydanticCustomError as error:
            raise ConfigurationError(f"Listing(default={default!r}): {error.message()}") from None

    def _order(self, sort: str) -> list[ColumnElement[Any]]:
        return [_directed(self._sorts[key.removeprefix("-")], key.startswith("-")) for key in sort.split(",")]

    def _checked_sort(self, sort: str) -> str:
        names = [key.removeprefix("-") for key in sort.split(",")]
        if not set(names) <= self._sorts.keys() or len(set(names)) < len(names) or len(names) > MAX_SORTS:
            raise PydanticCustomError("sort", "{rule}", {"rule": self._sort_rule()})
        return sort

    def _sort_rule(self) -> str:
        return (
            f"Sort by {', '.join(self._sorts)}: at most {MAX_SORTS} of them, each once, separated by commas, "
            "with - before those in descending order"
        )

    def _check_names(self, sent: Mapping[str, Any]) -> None:
        """Refuse what FastAPI lets pass: an operator that a filter does not have, and a parameter that comes twice."""
        errors = []
        for name, value in sent.items():
            field, separator, _ = name.partition("__")
            if name in self._names and isinstance(value, list):
                errors.append(_error("repeated", name, "Send this parameter once", value))
            elif separator and name not in self._names and field in self._filters:
                known = ", ".join(each for each in self._filters if each.partition("__")[0] == field)
                errors.append(_error("unknown_operator", name, f"Filter by one of {known}", value))
        if errors:
            raise RequestValidationError(errors)

    # What FastAPI is told

    def _parameters(self, default: str | None) -> Iterator[Parameter]:
        if self._sorts:
            key = f"-?({'|'.join(self._sorts)})"
            query = Query(
                description=f"{self._sort_rule()}.",
                # For the document only: it does not say that a name comes once, and is no message for people.
                json_schema_extra={"pattern": f"^{key}(,{key}){{0,{MAX_SORTS - 1}}}$"},
                examples=[f"-{name}" for name in self._sorts],
            )
            yield _parameter("sort", Annotated[str, AfterValidator(self._checked_sort)], query, default)
        for each in self._filters.values():
            yield _parameter(each.name, each.annotation, each.query, None)
        if self._search:
            query = Query(
                min_length=1,
                max_length=MAX_SEARCH,
                pattern=_NO_NUL,
                description="Rows with this text in one of them.",
                examples=["ada"],
            )
            yield _parameter("q", str, query, None)


def _parameter(name: str, annotation: Any, query: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[annotation, query], default=default)


def _error(type_: str, name: str, message: str, value: Any) -> dict[str, Any]:
    return {"type": type_, "loc": ("query", name), "msg": message, "input": value}


# Declarations


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or iskeyword(name) or name in _TAKEN:
        raise ConfigurationError(
            f"Listing: {name!r} cannot be a client's parameter: letters, digits and single underscores can, but for "
            f"Python's keywords and {', '.join(sorted(_TAKEN))}"
        )
    return name


def _checked_expression(name: str, expression: Any) -> Any:
    # A relationship is an expression without a type.
    if not isinstance(expression, SQLColumnExpression) or getattr(expression, "type", None) is None:
        raise ConfigurationError(
            f"Listing: {name!r} stands for {expression!r}: declare a column or an expression of columns"
        )
    return expression


def _sortable(name: str, expression: Any) -> Any:
    expression = inner = _checked_expression(name, expression)
    while isinstance(inner, UnaryExpression):
        if inner.modifier in (operators.asc_op, operators.desc_op):
            raise ConfigurationError(f"Listing: sort by {name!r} without asc() or desc(): the client says which")
        inner = inner.element
    return expression


def _directed(expression: Any, descending: bool) -> ColumnElement[Any]:
    nulls = _NULLS.get(getattr(expression, "modifier", None))
    plain = expression.element if nulls else expression
    directed: ColumnElement[Any] = plain.desc() if descending else plain.asc()
    return nulls(directed) if nulls else directed


_NULLS: dict[Any, Callable[[Any], ColumnElement[Any]]] = {
    operators.nulls_first_op: nulls_first,
    operators.nulls_last_op: nulls_last,
}


def _containing(columns: Sequence[Any]) -> Callable[[str], Criterion]:
    for column in columns:
        type_ = _stored_type("search", _checked_expression("search", column))
        if isinstance(type_, Enum) or not isinstance(type_, String):
            raise ConfigurationError(f"Listing: search {column} is not text: declare it as a filter")
    return lambda text: or_(*(column.icontains(text, autoescape=True) for column in columns))


# Filters


@dataclass(frozen=True, slots=True)
class _Filter:
    """One query parameter: its name, its type, and the criterion that its value makes."""

    name: str
    annotation: Any
    query: Any
    criterion: Callable[[Any], Criterion]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a client spells the values of a type; the operators besides equality."""

    annotation: Any
    examples: Sequence[Any]
    operators: tuple[str, ...]


_OPERATORS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "": (operator.eq, "Rows whose `{field}` is this."),
    "in": (
        lambda column, values: column.in_(values),
        f"Rows whose `{{field}}` is one of these, at most {MAX_VALUES}, separated by commas.",
    ),
    "lt": (operator.lt, "Rows whose `{field}` is below this."),
    "lte": (operator.le, "Rows whose `{field}` is this or below."),
    "gt": (operator.gt, "Rows whose `{field}` is above this."),
    "gte": (operator.ge, "Rows whose `{field}` is this or above."),
    "isnull": (
        lambda column, null: column.is_(None) if null else column.is_not(None),
        "With true rows without `{field}`, with false rows that have one.",
    ),
}
_RANGES = ("in", "lt", "lte", "gt", "gte")


def _filters(field: str, expression: Any) -> Iterator[_Filter]:
    kind = _kind(field, _stored_type(field, _checked_expression(field, expression)))
    nullable = ("isnull",) if getattr(expression, "nullable", False) else ()
    for suffix in ("", *kind.operators, *nullable):
        compare, description = _OPERATORS[suffix]
        annotation, examples = kind.annotation, kind.examples[:1]
        if suffix == "in":
            annotation, examples = _list_of(kind.annotation), [",".join(map(str, kind.examples[:2]))]
        elif suffix == "isnull":
            annotation, examples = bool, [True]
        query = Query(description=description.format(field=field), examples=[*examples])
        name = f"{field}__{suffix}" if suffix else field
        yield _Filter(name, annotation, query, partial(compare, expression))


def _list_of(annotation: Any) -> Any:
    values = TypeAdapter(Annotated[list[annotation], Field(max_length=MAX_VALUES)])
    return Annotated[str, AfterValidator(lambda text: values.validate_python(text.split(",")))]


_BINDING = ("process_bind_param", "bind_processor")


def _stored_type(field: str, expression: Any) -> TypeEngine[Any]:
    """Return the type of the values that are sent to the database: that of a decorator which leaves them alone."""
    type_: TypeEngine[Any] = expression.type
    while isinstance(type_, TypeDecorator):
        if any(getattr(type(type_), each) is not getattr(TypeDecorator, each) for each in _BINDING):
            raise _unusable(field, type_, "what it stores, type_coerce(column, String)")
        type_ = type_.impl_instance
    return type_


def _kind(field: str, type_: Any) -> _Kind:
    match type_:
        case Enum():
            members = {str(member.value): member for member in type_.enum_class or ()}
            values = [member.value for member in members.values()] or type_.enums
            # Pydantic takes no text for a member whose value is a number.
            spelled = BeforeValidator(lambda text: members.get(text, text))
            return _Kind(Annotated[type_.enum_class or Literal[tuple(values)], spelled], values, ("in",))
        case Boolean():
            return _Kind(bool, [True], ())
        case Integer():
            return _Kind(_integer(type_), [1, 2], _RANGES)
        case Float() if not _is_single(type_):
            return _Kind(Annotated[float, Field(allow_inf_nan=False)], [0.5, 1.5], _RANGES)
        case Float():
            raise _unusable(field, type_, "the decimal that it shows, cast(column, Numeric)")
        case Numeric():
            return _Kind(_decimal(type_), ["1", "2"], _RANGES)
        case DateTime(timezone=True):
            times = ["2024-01-31T00:00:00Z", "2024-02-29T12:00:00Z"]
            return _Kind(Annotated[AwareDatetime, AfterValidator(_in_utc)], times, _RANGES)
        case DateTime():
            return _Kind(NaiveDatetime, ["2024-01-31T00:00:00", "2024-02-29T12:00:00"], _RANGES)
        case Date():
            return _Kind(date, ["2024-01-31", "2024-02-29"], _RANGES)
        case Uuid():
            ids = ["2f1c1b34-5d8e-4f6a-9b0c-7d3e2a1f4b5c", "8a7b6c5d-4e3f-4a1b-8c9d-0e1f2a3b4c5d"]
            return _Kind(UUID if type_.as_uuid else Annotated[UUID, AfterValidator(str)], ids, ("in",))
        case String():
            text = Field(min_length=1, max_length=type_.length, pattern=_NO_NUL)
            return _Kind(Annotated[str, text], ["a", "b"], ("in",))
    raise _unusable(field, type_, "a type, func.lower(column, type_=String), or cast(column, String)")


def _unusable(field: str, type_: Any, instead: str) -> ConfigurationError:
    return ConfigurationError(f"Listing: {field!r} is of type {type_!r}, which no client can spell: declare {instead}")


def _integer(type_: Integer) -> Any:
    # PostgreSQL: "Numeric Types". The drivers raise for what is beyond.
    bits = 16 if isinstance(type_, SmallInteger) else 64 if isinstance(type_, BigInteger) else 32
    return Annotated[int, Field(ge=-(2 ** (bits - 1)), le=2 ** (bits - 1) - 1)]


def _is_single(type_: Float[Any]) -> bool:
    # A decimal that is sent is not the single that was stored of it: nothing would be equal.
    return isinstance(type_, REAL) or (type_.precision or 53) < 25


def _decimal(type_: Numeric[Any]) -> Any:
    # PostgreSQL declares no more than 1000 digits; without a scale, a declared precision is that of integers.
    digits = type_.precision or 1000
    places = type_.scale if type_.precision is None else type_.scale or 0
    return Annotated[Decimal, Field(max_digits=digits, decimal_places=places)]


def _in_utc(value: datetime) -> datetime:
    # What SQLite, which keeps no time zone, compares with; and what drivers would fail at, at the ends of the calendar.
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("datetime_range", "Input should be a datetime that there is in UTC") from None
