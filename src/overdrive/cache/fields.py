"""Header fields as they are read: lists, directives, seconds and dates (RFC 9110, section 5, and RFC 9111)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from .conditional import Header

#: Header fields by their names in lower case, with the lines of one name joined (RFC 9110, section 5.3).
Fields = Mapping[bytes, bytes]
#: Cache-Control by names in lower case. None: without a value; empty: with one that cannot be understood.
Directives = Mapping[bytes, bytes | None]

#: What stands for every larger number of seconds (RFC 9111, section 1.2.2).
FOREVER = 2**31

#: A quoted string, up to the end where it is not closed, so that no text is read twice.
_QUOTED = rb'"(?:[^"\\]|\\.)*("|\\?\Z)'
_CLOSINGS = re.compile(_QUOTED, re.DOTALL)
_ELEMENT = re.compile(rb'(?:%s|[^",])+' % _QUOTED, re.DOTALL)
_MONTHS = (b"jan", b"feb", b"mar", b"apr", b"may", b"jun", b"jul", b"aug", b"sep", b"oct", b"nov", b"dec")
_DATES = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rb"(?:mon|tue|wed|thu|fri|sat|sun), (?P<d>\d\d) (?P<m>[a-z]{3}) (?P<y>\d{4}) (?P<t>\d\d:\d\d:\d\d) (?:gmt|utc)",
        rb"(?:mon|tues|wednes|thurs|fri|satur|sun)day, (?P<d>\d\d)-(?P<m>[a-z]{3})-(?P<y>\d\d) (?P<t>\d\d:\d\d:\d\d) "
        rb"(?:gmt|utc)",
        rb"(?:mon|tue|wed|thu|fri|sat|sun) (?P<m>[a-z]{3}) (?P<d>[ \d]\d) (?P<t>\d\d:\d\d:\d\d) (?P<y>\d{4})",
    )
)


def combine(headers: Iterable[Header]) -> dict[bytes, bytes]:
    """Join the lines of each name (RFC 9110, section 5.3)."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        name = name.lower()
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def directives(value: bytes | None) -> dict[bytes, bytes | None]:
    """Read Cache-Control (RFC 9111, section 5.2).

    A directive that comes twice with different values cannot be understood (section 4.2.1 lets it be so), and neither
    can one with space around its `=`; quotes around a value do not matter.
    """
    found: dict[bytes, bytes | None] = {}
    for element in elements(value or b""):
        name, equals, argument = element.partition(b"=")
        read: bytes | None = argument if equals else None
        if read is not None and len(read) > 1 and read[:1] == read[-1:] == b'"':
            read = read[1:-1]
        if name != name.rstrip():
            read = b""
        name = name.strip().lower()
        found[name] = read if found.get(name, read) == read else b""
    return found


def elements(value: bytes) -> list[bytes]:
    """Split a list (RFC 9110, section 5.6.1); where a quote is not closed, none of them hides a comma."""
    if b'"' not in value or _CLOSINGS.findall(value)[-1] != b'"':
        parts = value.split(b",")
    else:
        parts = [found[0] for found in _ELEMENT.finditer(value)]
    return [element for part in parts if (element := part.strip(b" \t"))]


def delta_seconds(value: bytes | None) -> int | None:
    """Read a number of seconds (RFC 9111, section 1.2.2); None where it is none."""
    if value is None or not value.isdigit():
        return None
    value = value.lstrip(b"0")
    return min(int(value or b"0"), FOREVER) if len(value) <= 10 else FOREVER


def http_date(value: bytes | None, now: float) -> float | None:
    """Read a date in any of its three forms (RFC 9110, section 5.6.7); None where it is none.

    Case does not matter, and the zone is GMT or UTC (RFC 9111, section 4.2).

    now: which century a year of two digits is of: at most 50 years ahead.
    """
    found = next((found for form in _DATES if (found := form.fullmatch(value or b""))), None)
    if found is None or (month := found["m"].lower()) not in _MONTHS:
        return None
    year, (hour, minute, second) = int(found["y"]), map(int, found["t"].split(b":"))
    if len(found["y"]) == 2:
        this = datetime.fromtimestamp(now, UTC).year
        year += this // 100 * 100
        year -= 100 if year > this + 50 else 0
    try:
        # A leap second is not a moment of its own.
        read = datetime(year, _MONTHS.index(month) + 1, int(found["d"]), hour, minute, second - (second == 60))
    except ValueError:
        return None
    return read.replace(tzinfo=UTC).timestamp()


def names(value: bytes | None) -> list[bytes]:
    """Return the names in a list, `Vary` say, in lower case."""
    return [name.lower() for name in elements(value or b"")]
