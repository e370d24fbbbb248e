"""Round trips of every type, and the refusal of everything else."""

from __future__ import annotations

import math
import random
import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from itertools import islice
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pagination.cases import damaged

from overdrive.errors import InvalidCursorError, PageError
from overdrive.pagination.cursor import MAX_LENGTH, Position, _tag, decode, encode

KEY, BINDING = b"k" * 32, b"route"


class Mood(Enum):
    GOOD = "g"
    BAD = "b"


class Level(IntEnum):
    LOW = 1


class Word(str, Enum):  # noqa: UP042 (StrEnum has another str())
    YES = "y"


def _encode(values: Any, types: Any, backward: bool = False) -> str:
    return encode(values, types, backward=backward, binding=BINDING, key=KEY)


def _decode(cursor: str, types: Any) -> Position:
    return decode(cursor, types, binding=BINDING, keys=[KEY])


# Whole seconds, as databases have them: CPython reads an offset below one second as UTC.
offsets = st.integers(-86399, 86399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
VALUES: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers() | st.integers(-(2**64), 2**64),
    float: st.floats(),
    str: st.text(st.characters(exclude_categories=["Cs"])),
    bytes: st.binary(),
    Decimal: st.decimals(),
    UUID: st.uuids(),
    datetime: st.datetimes() | st.datetimes(timezones=offsets),
    date: st.dates(),
    time: st.times() | st.times(timezones=offsets),
    timedelta: st.timedeltas(),
}
plain = st.sampled_from(sorted(VALUES, key=str)).flatmap(lambda t: st.tuples(st.just(t), VALUES[t] | st.none()))
typed = plain | st.tuples(st.just(Mood), st.sampled_from(Mood)) | st.tuples(st.just(Level), st.just(Level.LOW))
loose = plain.map(lambda pair: (object, pair[1]))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, Decimal):
        return isinstance(other, Decimal) and one.as_tuple() == other.as_tuple()
    if isinstance(one, (datetime, time)):
        return bool(one == other and one.tzinfo == other.tzinfo)
    return type(one) is type(other) and one == other


@given(st.lists(typed | loose, max_size=4), st.booleans())
@example([(int, 10**900)], False)
@example([(str, "\r\n\0")], True)
def test_every_type_comes_back_as_it_was(pairs: list[tuple[type, Any]], backward: bool) -> None:
    types, values = [type_ for type_, _ in pairs], [value for _, value in pairs]
    position = _decode(_encode(values, types, backward), types)
    assert position.backward is backward
    assert len(position.values) == len(values)
    assert all(map(_same, values, position.values))


def test_a_str_enum_in_a_text_column_travels_as_its_value() -> None:
    assert _decode(_encode([Word.YES], [str]), [str]).values == ("y",)


def test_a_cursor_is_short_and_safe_in_a_url() -> None:
    cursor = _encode([datetime(2026, 1, 1), 123456], [datetime, int])
    assert len(cursor) < 64
    assert set(cursor) <= set(string.ascii_letters + string.digits + "-_")


@pytest.mark.parametrize(
    ("value", "type_"),
    [(True, int), (1, bool), (1, str), (datetime(2026, 1, 1), date), ([], object), ("GOOD", Mood)],
)
def test_a_value_of_another_type_is_the_orders_fault(value: Any, type_: type) -> None:
    with pytest.raises(PageError, match=r"cast\(\)"):
        _encode([value], [type_])


def test_keys_too_long_for_a_cursor_are_the_orders_fault() -> None:
    with pytest.raises(PageError, match="something shorter"):
        _encode(["x" * MAX_LENGTH], [str])


@given(st.lists(plain, min_size=1, max_size=2), st.lists(plain | st.just((Mood, None)), min_size=1, max_size=2))
def test_other_types_either_fit_or_are_refused(made: list[Any], read: list[Any]) -> None:
    cursor = _encode([value for _, value in made], [type_ for type_, _ in made])
    types = [type_ for type_, _ in read]
    try:
        position = _decode(cursor, types)
    except InvalidCursorError:
        return
    assert all(v is None or isinstance(v, t) for v, t in zip(position.values, types, strict=True))


def test_an_enum_member_that_is_gone_is_refused() -> None:
    with pytest.raises(InvalidCursorError):
        _decode(_encode([Mood.GOOD], [Mood]), [Level])


@pytest.mark.parametrize("binding", [b"", b"route2", b"rout"])
def test_a_cursor_for_something_else_is_refused(binding: bytes) -> None:
    with pytest.raises(InvalidCursorError):
        decode(_encode([1], [int]), [int], binding=binding, keys=[KEY])


def test_the_binding_cannot_be_shifted_into_the_payload() -> None:
    cursor = _encode([1], [int])
    raw = urlsafe_b64decode(cursor + "==")
    shifted = urlsafe_b64encode(raw[:16] + BINDING[-1:] + raw[16:]).decode().rstrip("=")
    with pytest.raises(InvalidCursorError):
        decode(shifted, [int], binding=BINDING[:-1], keys=[KEY])


def test_any_of_the_keys_may_have_signed_and_no_other() -> None:
    for key in (KEY, b"older"):
        made = encode([1], [int], backward=False, binding=BINDING, key=key)
        assert decode(made, [int], binding=BINDING, keys=[KEY, b"older"]).values == (1,)
        with pytest.raises(InvalidCursorError):
            decode(made, [int], binding=BINDING, keys=[b"other"])
        with pytest.raises(InvalidCursorError):
            decode(made, [int], binding=BINDING, keys=[])


# Signed by us, and yet not what the order needs: what a deployment may leave behind.
@pytest.mark.parametrize(
    ("payload", "types"),
    [
        (b"", [int]),
        (b"\xc1", [int]),
        (b"\xc4\x04ab", [int]),
        (msgspec.msgpack.encode({}), [int]),
        (msgspec.msgpack.encode(7), [int]),
        (msgspec.msgpack.encode([]), [int]),
        (msgspec.msgpack.encode([False, 1, 2]), [int]),
        (msgspec.msgpack.encode([False, [1]]), [int]),
        (msgspec.msgpack.encode([False, {"a": 1}]), [str]),
        (msgspec.msgpack.encode([False, "1"]), [datetime]),
        (msgspec.msgpack.encode([False, b"123"]), [UUID]),
        (msgspec.msgpack.encode([False, "NaN and more"]), [Decimal]),
        (msgspec.msgpack.encode([False, hex(2**90)]), [timedelta]),
        (msgspec.msgpack.encode([False, float("inf")]), [int]),
        (msgspec.msgpack.encode([False, float("nan")]), [timedelta]),
        (msgspec.msgpack.encode([False, "x"]), [object]),
        (msgspec.msgpack.encode([False, ["complex", 1]]), [object]),
        (msgspec.msgpack.encode([False, [[], 1]]), [object]),
        (msgspec.msgpack.encode([False, []]), [Mood]),
    ],
)
def test_a_signed_cursor_of_another_form_is_refused(payload: bytes, types: list[type]) -> None:
    raw = _tag(payload, BINDING, KEY) + payload
    with pytest.raises(InvalidCursorError):
        _decode(urlsafe_b64encode(raw).decode().rstrip("="), types)


@given(st.text() | st.text(string.ascii_letters + string.digits + "-_"))
@example("")
@example("\ud800")
@example("A" * 5)
@example("A" * (MAX_LENGTH + 1))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidCursorError):
        _decode(text, [int])


def test_every_single_change_is_refused() -> None:
    cursor = _encode([123456, "abc"], [int, str])
    alphabet = string.ascii_letters + string.digits + "-_=+/ \n."
    changed = {cursor[:i] + c + cursor[i + 1 :] for i in range(len(cursor)) for c in alphabet}
    changed |= {cursor[:i] + c + cursor[i:] for i in range(len(cursor) + 1) for c in alphabet}
    changed |= {cursor[:i] + cursor[i + 1 :] for i in range(len(cursor))} | {cursor[:i] for i in range(len(cursor))}
    for text in changed - {cursor}:
        with pytest.raises(InvalidCursorError):
            _decode(text, [int, str])


def test_random_damage_is_refused() -> None:
    cursor = _encode([123456, "abc"], [int, str], backward=True)
    for made in islice(damaged(cursor, random.Random(1)), 20_000):
        with pytest.raises(InvalidCursorError):
            _decode(made, [int, str])
