"""A page written without its response model has the bytes that it would have had through it, or is not written so."""

from __future__ import annotations

import enum
import uuid
from collections import namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    computed_field,
    create_model,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from overdrive.pagination.body import Writer
from overdrive.pagination.page import (
    CountedCursorPage,
    CountedPage,
    CursorPage,
    CursorParams,
    Found,
    LimitOffsetPage,
    LimitOffsetParams,
    Page,
    PageParams,
)

ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(seconds=-4773))])
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    str: st.text(st.characters(exclude_categories=["Cs"])),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    datetime: st.datetimes(timezones=ZONES),
    date: st.dates(),
    time: st.times(),
    uuid.UUID: st.uuids(),
}
ENVELOPES: list[Any] = [CursorPage, CountedCursorPage, Page, CountedPage, LimitOffsetPage]


def through_the_model(envelope: Any, found: Found) -> bytes:
    """What FastAPI does with a page that an endpoint returns."""
    adapter = TypeAdapter(envelope)
    page = adapter.validate_python(envelope.of(found), from_attributes=True)
    return adapter.dump_json(page, by_alias=True)


def found_in(envelope: Any, names: list[str], rows: list[tuple[Any, ...]]) -> Found:
    kind = namedtuple("kind", [*names, "overdrive_key_0"])
    items = [kind(*row, "of the order") for row in rows]
    if envelope.style == "cursor":
        return Found(items, CursorParams(), True, 7, "exact", "next", None, tuple(names))
    params = PageParams(size=10) if envelope.style == "page" else LimitOffsetParams(limit=10)
    return Found(items, params, True, 7, "exact", columns=tuple(names))


@st.composite
def pages(draw: st.DrawFn) -> tuple[Any, Any, Found]:
    types = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=5))
    optional = [draw(st.booleans()) for _ in types]
    names = [f"field_{number}" for number in range(len(types))]
    fields: dict[str, Any] = {}
    for name, type_, is_optional in zip(names, types, optional, strict=True):
        options = draw(st.sampled_from([{}, {"serialization_alias": f"{name}Out"}, {"alias": f"{name}Ä"}]))
        default = {"default": None} if is_optional and draw(st.booleans()) else {}
        fields[name] = (type_ | None if is_optional else type_, Field(**options, **default))
    model = create_model("Out", __config__=ConfigDict(populate_by_name=True), **fields)
    values = [VALUES[type_] | st.none() if none else VALUES[type_] for type_, none in zip(types, optional, strict=True)]
    envelope = draw(st.sampled_from(ENVELOPES))
    return envelope[model], model, found_in(envelope, names, draw(st.lists(st.tuples(*values), max_size=4)))


@settings(max_examples=200, deadline=None)
@given(pages())
def test_what_is_written_is_what_the_model_makes(page: tuple[Any, Any, Found]) -> None:
    envelope, model, found = page
    writer = Writer.of(envelope, model)
    assert writer is not None
    body = writer.write(found)
    assert body is None or body == through_the_model(envelope, found)


ORDINARY: dict[Any, Any] = {
    int: 2**70,
    str: 'ä"\\\n\x00\u2028',
    bool: True,
    float: -123456.789,
    datetime: datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
    date: date(1, 1, 1),
    time: time(1, 2, 3, 4),
    uuid.UUID: uuid.UUID(int=1),
}


@pytest.mark.parametrize("type_", ORDINARY, ids=str)
def test_ordinary_values_are_written(type_: Any) -> None:
    model = create_model("Out", value=(type_ | None, ...))
    writer = Writer.of(CursorPage[model], model)
    assert writer is not None
    found = found_in(CursorPage, ["value"], [(ORDINARY[type_],), (None,)])
    body = writer.write(found)
    assert body is not None
    assert body == through_the_model(CursorPage[model], found)


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (int, "1"),
        (int, True),
        (int, None),
        (str, Text("text")),
        (float, 1),
        (float, 1e300),
        (float, float("nan")),
        (date, datetime(2026, 1, 1)),
        (datetime, datetime(1900, 1, 1, tzinfo=timezone(timedelta(seconds=-4773)))),
    ],
    ids=str,
)
def test_a_value_the_model_might_change_is_left_to_it(type_: Any, value: Any) -> None:
    model = create_model("Out", value=(type_, ...))
    writer = Writer.of(CursorPage[model], model)
    assert writer is not None
    assert writer.write(found_in(CursorPage, ["value"], [(value,)])) is None


def test_a_page_of_other_columns_is_left_to_the_model() -> None:
    model = create_model("Out", value=(int, 1), other=(int, 2))
    writer = Writer.of(CursorPage[model], model)
    assert writer is not None
    assert writer.write(found_in(CursorPage, ["value"], [(1,)])) is None
    assert writer.write(found_in(CursorPage, ["other", "value"], [(1, 2)])) is None


def validated(cls: Any, value: Any) -> Any:
    return value


def out(annotation: Any = int, field: Any = ..., **members: Any) -> Any:
    config = members.pop("model_config", None)
    return type(
        "Out",
        (BaseModel,),
        {
            "__module__": __name__,
            "__annotations__": {"value": annotation},
            **({} if field is ... else {"value": field}),
            **({"model_config": config} if config else {}),
            **members,
        },
    )


TALKATIVE = {
    "constraint": out(Annotated[int, Field(gt=0)]),
    "pattern": out(Annotated[str, Field(max_length=3)]),
    "enum": out(Colour),
    "literal": out(Literal["a"]),
    "decimal": out(Decimal),
    "list": out(list[int]),
    "union": out(int | str),
    "any": out(Any),
    "nested": out(out()),
    "field validator": out(look=field_validator("value")(classmethod(validated))),
    "field serializer": out(look=field_serializer("value")(lambda self, value: value)),
    "model validator": out(look=model_validator(mode="after")(lambda self: self)),
    "model serializer": out(look=model_serializer(mode="plain")(lambda self: {})),
    "computed": out(more=computed_field(property(lambda self: 1), return_type=int)),
    "post init": out(model_post_init=lambda self, _context: None),
    "extra": out(model_config=ConfigDict(extra="forbid")),
    "stripped": out(str, model_config=ConfigDict(str_strip_whitespace=True)),
    "json config": out(datetime, model_config=ConfigDict(ser_json_temporal="seconds")),
    "left out": out(field=Field(exclude=True)),
    "by another name": out(field=Field(validation_alias="other")),
}


@pytest.mark.parametrize("model", TALKATIVE.values(), ids=list(TALKATIVE))
def test_a_model_with_a_say_in_it_keeps_it(model: Any) -> None:
    assert Writer.of(CursorPage[model], model) is None


T = TypeVar("T")


class Own(CursorPage[T], Generic[T]):
    more: int = 1


def test_an_envelope_of_ones_own_is_left_to_it() -> None:
    model = create_model("Out", value=(int, ...))
    assert Writer.of(Own[model], model) is None
