"""Cursors: the order keys of one row as a signed, opaque text.

A cursor is base64url without padding (RFC 4648, sections 3.2 and 5) of a 16-byte tag, BLAKE2b's with a key (RFC 7693,
section 2.9), and a msgpack array: the direction, then one value a key. A value travels in the form its key's Python
type has below, so that a cursor holds nothing but what that type can be.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from hmac import compare_digest
from typing import Any
from uuid import UUID

import msgspec

from overdrive.errors import InvalidCursorError, PageError

#: Characters; what a query string carries everywhere, and more than any sensible order needs.
MAX_LENGTH = 4096

_VERSION = b"overdrive.cursor.1"
_TAG_SIZE = 16
_INT64 = range(-(2**63), 2**63)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Position:
    """A place between the rows of an ordered statement.

    values: the order keys of the row at this place; without any, the place is the end that is walked from:
        before the first row, or with `backward` after the last.
    backward: whether the rows before this place are asked for, not those after it.
    """

    values: tuple[Any, ...] = ()
    backward: bool = False


def encode(values: Sequence[object], types: Sequence[type], *, backward: bool, binding: bytes, key: bytes) -> str:
    """Return the cursor for a position.

    types: one a value: bool, int, float, str, bytes, Decimal, UUID, datetime, date, time, timedelta, an Enum,
        or `object` for any of these but the Enum.
    binding: what the cursor may be used with: route, filters, order.
    key: the secret that signs it.

    Raises `PageError` where a value is not of its type, or the cursor would be longer than `MAX_LENGTH`.
    """
    wire = [to_wire(value, type_) for value, type_ in zip(values, types, strict=True)]
    payload = msgspec.msgpack.encode([backward, *wire])
    cursor = _text(_tag(payload, binding, key) + payload)
    if len(cursor) > MAX_LENGTH:
        raise PageError(
            f"The order keys of this row make a cursor of {len(cursor)} characters, more than {MAX_LENGTH}: "
            "order by something shorter."
        )
    return cursor


def decode(cursor: str, types: Sequence[type], *, binding: bytes, keys: Sequence[bytes]) -> Position:
    """Return the position `encode` was given.

    types, binding: what they were when the cursor was made.
    keys: secrets, any of which may have signed it.

    Raises `InvalidCursorError` for every other string, and no other exception.
    """
    payload = _verified(cursor, binding, keys)
    try:
        backward, *wire = msgspec.msgpack.decode(payload)
        # No values at all is an end of the walk; otherwise there is one a key.
        values = zip(wire, types, strict=True) if wire else ()
        return Position(tuple(from_wire(value, type_) for value, type_ in values), backward)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        # Signed by us, for a type that a deployment has changed since.
        raise InvalidCursorError("The cursor was made for other order keys: start at the first page.") from error


def _verified(cursor: str, binding: bytes, keys: Sequence[bytes]) -> bytes:
    try:
        raw = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)) if len(cursor) <= MAX_LENGTH else b""
    except ValueError:
        raw = b""
    tag, payload = raw[:_TAG_SIZE], raw[_TAG_SIZE:]
    # The decoder ignores foreign characters and the last one's spare bits: only the canonical text will do.
    signed = any(compare_digest(tag, _tag(payload, binding, key)) for key in keys)
    if not signed or _text(raw) != cursor:
        raise InvalidCursorError(
            "The cursor is damaged or expired, or was made for another route, order or filter: start at the first page."
        )
    return payload


def _tag(payload: bytes, binding: bytes, key: bytes) -> bytes:
    # The length keeps the end of the binding apart from the start of the payload.
    message = _VERSION + len(binding).to_bytes(8, "big") + binding + payload
    # A longer key than BLAKE2b takes is hashed, as HMAC does it.
    key = key if len(key) <= blake2b.MAX_KEY_SIZE else blake2b(key).digest()
    return blake2b(message, key=key, digest_size=_TAG_SIZE).digest()


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _int_to_wire(value: int) -> int | str:
    # msgpack ends at 64 bits; hexadecimal, because CPython refuses decimals of thousands of digits.
    return value if value in _INT64 else hex(value)


def _int_from_wire(wire: Any) -> int:
    return int(wire, 16) if isinstance(wire, str) else int(wire)


def _same(value: Any) -> Any:
    return value


#: How a value of each type travels, and back. Subclasses before what they derive from.
_FORMS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    bool: (_same, _same),
    int: (_int_to_wire, _int_from_wire),
    float: (_same, _same),
    # Not str(), which an Enum that is a str may answer with its name.
    str: (str.__str__, _same),
    bytes: (_same, _same),
    Decimal: (str, Decimal),
    UUID: (lambda value: value.bytes, lambda wire: UUID(bytes=wire)),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (
        lambda value: _int_to_wire(value // _MICROSECOND),
        lambda wire: _int_from_wire(wire) * _MICROSECOND,
    ),
}
_BY_NAME = {type_.__name__: type_ for type_ in _FORMS}


def _form(value: object) -> type | None:
    if type(value) in _FORMS:
        return type(value)
    return next((type_ for type_ in _FORMS if isinstance(value, type_)), None)


def to_wire(value: Any, type_: type) -> Any:
    """Return the form in which a value of this type travels; raises `PageError` where it is not of it."""
    if value is None:
        return None
    if issubclass(type_, Enum) and isinstance(value, type_):
        return value.name
    form = _form(value)
    if form is not None and type_ is object:
        return [form.__name__, _FORMS[form][0](value)]
    if form is None or form is not type_:
        raise PageError(
            f"An order key is a {type(value).__name__} where its column's type says {type_.__name__}: "
            "order by cast() or type_coerce() of it, to a type that says what it is."
        )
    return _FORMS[form][0](value)


def from_wire(wire: Any, type_: type) -> Any:
    """Return the value that `to_wire` was given; raises all kinds of errors for what it has not made."""
    if wire is None:
        return None
    if issubclass(type_, Enum):
        return type_[wire]
    if type_ is object:
        name, wire = wire
        type_ = _BY_NAME[name]
    value = _FORMS[type_][1](wire)
    if _form(value) is not type_:
        raise TypeError(type_)
    return value
