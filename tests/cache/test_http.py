"""The rules of RFC 9111 and its kin, one by one."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.cache import http
from overdrive.cache.fields import combine, delta_seconds, directives, http_date
from overdrive.cache.http import Header, Stored, Target, Worth

NOW = 1_800_000_000.0


def date(offset: float = 0) -> bytes:
    return formatdate(NOW + offset, usegmt=True).encode()


def fields(text: str) -> dict[bytes, bytes]:
    """Read lines of `Name: value`."""
    return combine(headers(text))


def headers(text: str) -> list[Header]:
    lines = (line.strip().partition(":") for line in text.strip().splitlines() if line.strip())
    return [(name.encode(), value.strip().encode()) for name, _, value in lines]


def stored(text: str = "Cache-Control: max-age=60", *, request: str = "", status: int = 200, **options: Any) -> Stored:
    options = {"requested": NOW, "received": NOW} | options
    response = http.stored(fields(request), status, headers(text), **options)
    assert response is not None
    return response.with_body(b"body")


# Cache-Control


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (b"", {}),
        (b"max-age=60, public", {b"max-age": b"60", b"public": None}),
        (b"MAX-age=60 ,, Public ,", {b"max-age": b"60", b"public": None}),
        (b'max-age="60"', {b"max-age": b"60"}),
        (b'x="a, no-store", max-age=1', {b"x": b"a, no-store", b"max-age": b"1"}),
        (b'x="a \\", no-store", max-age=1', {b"x": b'a \\", no-store', b"max-age": b"1"}),
        (b'x="a, no-store', {b"x": b'"a', b"no-store": None}),
        (b'x="a\\', {b"x": b'"a\\'}),
        (b"max-age=60, max-age=60", {b"max-age": b"60"}),
        (b"max-age=60, max-age=90", {b"max-age": b""}),
        (b"max-age =60", {b"max-age": b""}),
        (b"max-age= 60", {b"max-age": b" 60"}),
        (b'private="x-user", no-cache', {b"private": b"x-user", b"no-cache": None}),
    ],
)
def test_directives(value: bytes, read: dict[bytes, bytes | None]) -> None:
    assert directives(value) == read


@given(st.binary(max_size=60) | st.text(alphabet='a=,"\\ -', max_size=40).map(str.encode))
def test_any_bytes_can_be_read(value: bytes) -> None:
    assert all(name == name.strip().lower() for name in directives(value))
    delta_seconds(value)
    http_date(value, NOW)
    http.may_be_stored({}, 200, {b"cache-control": value, b"vary": value, b"connection": value})
    response = http.stored({}, 200, [(b"cache-control", b"max-age=1"), (b"etag", value)], requested=NOW, received=NOW)
    assert response is not None
    http.is_not_modified({b"if-none-match": value, b"if-modified-since": value}, response)
    http.invalidated(("http", b"a", "/", b"/", b""), "POST", 200, [(b"location", value)])


def test_quotes_that_never_close_cost_no_more_than_their_length() -> None:
    assert len(directives(b'"\\' * 50_000)) == 1
    assert directives(b'x="' + b"\\" * 100_001)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0),
        (b"60", 60),
        (b"0060", 60),
        (b"2147483648", 2**31),
        (b"2147483649", 2**31),
        (b"9" * 5000, 2**31),
        (b"", None),
        (b"-1", None),
        (b"+1", None),
        (b"1.5", None),
        (b"1a", None),
        (b"'60'", None),
        (b" 60", None),
        ("٣".encode(), None),
        (None, None),
    ],
)
def test_seconds(value: bytes | None, seconds: int | None) -> None:
    assert delta_seconds(value) == seconds


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        (b"Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", 784_111_777),
        (b"Sun Nov  6 08:49:37 1994", 784_111_777),
        (b"sun, 06 nov 1994 08:49:37 utc", 784_111_777),
        (b"Sat, 31 Dec 2016 23:59:60 GMT", 1_483_228_799),
        (b"Sunday, 06-Nov-60 08:49:37 GMT", 2_866_956_577),
        (b"0", None),
        (b"-1", None),
        (b"", None),
        (b"Sun, 06 Nov 1994 08:49:37 AEST", None),
        (b"Sun, 06 Nov 1994 08:49:37 +0000", None),
        (b"Sun, 06 Nov 1994 8:49:37 GMT", None),
        (b"Sun, 06 Nov 94 08:49:37 GMT", None),
        (b"Sun 06 Nov 1994 08:49:37 GMT", None),
        (b"Sun,  06 Nov 1994 08:49:37 GMT", None),
        (b"Sun, 06-Nov-1994 08:49:37 GMT", None),
        (b"Sun, 06 Nov 1994 08.49.37 GMT", None),
        (b"Sun, 31 Feb 1994 08:49:37 GMT", None),
        (b"Sun, 06 Foo 1994 08:49:37 GMT", None),
        (b"Sun, 06 Nov 1994 25:49:37 GMT", None),
        (None, None),
    ],
)
def test_dates(value: bytes | None, moment: float | None) -> None:
    assert http_date(value, NOW) == moment


@given(st.integers(0, 250_000_000_000))
def test_every_date_is_read_back(moment: int) -> None:
    assert http_date(formatdate(moment, usegmt=True).encode(), NOW) == moment


# Storing


EXPLICIT = ("public", "max-age=0", "s-maxage=0")


@pytest.mark.parametrize(
    ("request_", "status", "response", "may"),
    [
        ("", 200, "", True),
        *[("", status, "", True) for status in (203, 204, 300, 301, 308, 404, 405, 410, 414, 501)],
        *[("", status, "", False) for status in (302, 307, 400, 403, 500, 503, 299, 599)],
        *[("", 299, explicit, True) for explicit in ("Expires: x", *map("Cache-Control: {}".format, EXPLICIT))],
        ("", 103, "", False),
        ("", 206, "", False),
        ("", 304, "", False),
        ("", 200, "Content-Range: bytes 0-1/2", False),
        ("", 200, "Set-Cookie: a=b", False),
        ("", 200, "Vary: *", False),
        ("", 200, "Vary: Accept, *", False),
        ("", 200, "Vary: Accept\nVary: *", False),
        ("", 200, "Cache-Control: no-store", False),
        ("", 200, "Cache-Control: No-Store", False),
        ("", 200, "Cache-Control: max-age=1\nCache-Control: no-store", False),
        ("", 200, "Cache-Control: private", False),
        ("", 200, 'Cache-Control: private="x"', False),
        ("", 200, "Cache-Control: no-cache", True),
        ("", 200, "Cache-Control: no-storefoo", True),
        ("", 200, "Cache-Control: must-understand, no-store", True),
        ("", 299, "Cache-Control: must-understand, no-store", False),
        ("", 299, "Cache-Control: must-understand", False),
        ("", 200, "CDN-Cache-Control: no-store", True),
        ("Cache-Control: no-store", 200, "", False),
        ("Authorization: x", 200, "Cache-Control: max-age=60", False),
        ("Authorization: x", 200, "Cache-Control: public", True),
        ("Authorization: x", 200, "Cache-Control: s-maxage=1", True),
        ("Authorization: x", 200, "Cache-Control: must-revalidate", True),
        ("Authorization: x", 200, "Cache-Control: public, no-store", False),
    ],
)
def test_what_may_be_stored(request_: str, status: int, response: str, may: bool) -> None:
    assert http.may_be_stored(fields(request_), status, fields(response)) is may


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("", False),
        ("Cache-Control: public", False),
        ("Cache-Control: max-age=0", False),
        ("Cache-Control: no-cache", False),
        ("Cache-Control: max-age=0, stale-while-revalidate=5", True),
        ("Cache-Control: max-age=0, stale-if-error=5", True),
        ("Cache-Control: max-age=0, stale-if-error=5, must-revalidate", False),
        ('ETag: "a"', True),
        (f"Last-Modified: {date(-9).decode()}", True),
        ('Cache-Control: no-cache\nETag: "a"', True),
    ],
)
def test_what_could_never_be_used_is_not_stored(text: str, is_kept: bool) -> None:
    assert (http.stored({}, 200, headers(text), requested=NOW, received=NOW) is not None) is is_kept


def test_what_belongs_to_the_connection_is_not_stored() -> None:
    text = """
        Cache-Control: max-age=60
        Connection: X-Hop, close
        X-hop: 1
        Keep-Alive: timeout=5
        Proxy-Authenticate: Basic
        Proxy-Authentication-Info: a
        Proxy-Authorization: b
        Proxy-Connection: close
        Transfer-Encoding: chunked
        Upgrade: h2c
        Age: 3
        X-Kept: 1
    """
    assert [name for name, _ in stored(text).headers] == [b"Cache-Control", b"X-Kept", b"etag", b"content-length"]


def test_a_200_gets_a_strong_tag_of_its_body() -> None:
    response = http.stored({}, 200, headers("Cache-Control: max-age=60"), requested=NOW, received=NOW)
    assert response is not None
    one, same, other = (response.with_body(body) for body in (b"a", b"a", b"b"))
    assert one.tag == same.tag != other.tag
    assert one.tag is not None
    assert one.tag.startswith(b'"')
    assert (one.etag, stored(status=404).tag) == (None, None)
    given = stored('Cache-Control: max-age=60\nETag: W/"x"')
    assert (given.tag, given.etag) == (b'W/"x"', b'W/"x"')


# Freshness


@pytest.mark.parametrize(
    ("text", "lifetime"),
    [
        ("Cache-Control: max-age=60", 60),
        ("Cache-Control: MaX-aGe=60", 60),
        ('Cache-Control: max-age="60"', 60),
        ("Cache-Control: max-age='60'", 0),
        ("Cache-Control: max-age=0060", 60),
        ("Cache-Control: max-age=60.0", 0),
        ("Cache-Control: max-age=60a", 0),
        ("Cache-Control: max-age=a60", 0),
        ("Cache-Control: max-age=-60", 0),
        ("Cache-Control: max-age", 0),
        ("Cache-Control: max-age=", 0),
        ("Cache-Control: max-age = 60", 0),
        ("Cache-Control: max-age=99999999999", 2**31),
        ("Cache-Control: max-age=60, max-age=61", 0),
        ("Cache-Control: max-age=60\nCache-Control: max-age=61", 0),
        ('Cache-Control: extension="max-age=60"', 0),
        ('Cache-Control: extension="max-age=1", max-age=60', 60),
        ("Cache-Control: foo=bar, max-age=60, baz", 60),
        ("Cache-Control: s-maxage=9, max-age=60", 9),
        ("Cache-Control: max-age=60, s-maxage=0", 0),
        ("Cache-Control: s-maxage=x, max-age=60", 0),
        ("Cache-Control: max-age=60, no-cache", 0),
        ('Cache-Control: max-age=60, no-cache="x-y"', 0),
        (f"Cache-Control: max-age=0\nExpires: {date(60).decode()}", 0),
        (f"Cache-Control: max-age=9\nExpires: {date(60).decode()}", 9),
        (f"Cache-Control: public\nExpires: {date(60).decode()}", 60),
        (f"Date: {date(-5).decode()}\nExpires: {date(60).decode()}", 65),
        (f"Date: nonsense\nExpires: {date(60).decode()}", 60),
        (f"Expires: {date(-60).decode()}", 0),
        ("Expires: 0", 0),
        ("Expires:", 0),
        (f"Expires: {date(60).decode()}\nExpires: {date(70).decode()}", 0),
        (f"Last-Modified: {date(-1000).decode()}", 0),
        ("CDN-Cache-Control: max-age=60", 0),
        ("Surrogate-Control: max-age=60", 0),
        ("", 0),
    ],
)
def test_lifetime(text: str, lifetime: float) -> None:
    assert http.freshness_lifetime(200, fields(text), NOW, heuristics=False) == lifetime


@pytest.mark.parametrize(
    ("status", "text", "lifetime"),
    [
        (200, f"Last-Modified: {date(-1000).decode()}", 100),
        (404, f"Last-Modified: {date(-1000).decode()}", 100),
        (500, f"Last-Modified: {date(-1000).decode()}", 0),
        (599, f"Last-Modified: {date(-1000).decode()}\nCache-Control: public", 100),
        (200, f"Last-Modified: {date(-(10**8)).decode()}", 86_400),
        (200, f"Last-Modified: {date(1000).decode()}", 0),
        (200, f"Last-Modified: {date(-1000).decode()}\nDate: {date(-500).decode()}", 50),
        (200, f"Last-Modified: {date(-1000).decode()}\nExpires: 0", 0),
        (200, f"Last-Modified: {date(-1000).decode()}\nCache-Control: max-age=1", 1),
        (200, "", 0),
    ],
)
def test_a_guessed_lifetime(status: int, text: str, lifetime: float) -> None:
    assert http.freshness_lifetime(status, fields(text), NOW, heuristics=True) == lifetime


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("", 2),
        ("Age: 10", 12),
        (f"Date: {date(-30).decode()}", 30),
        (f"Date: {date(30).decode()}", 2),
        (f"Date: {date(-30).decode()}\nAge: 10", 30),
        (f"Date: {date(-30).decode()}\nAge: 100", 102),
        ("Age: 10, 20", 12),
        ("Age: 10\nAge: 20", 12),
        ("Age: abc", 2),
        ("Age: -10", 2),
        ("Age: 10.5", 2),
        ("Age: 10;a=b", 2),
        ("Age: abc, 10", 2),
        ("Age: 99999999999", 2**31 + 2),
    ],
)
def test_age(text: str, age: float) -> None:
    assert http.initial_age(fields(text), NOW - 2, NOW) == age


# Vary


@pytest.mark.parametrize(
    ("vary", "first", "second", "is_selected"),
    [
        ("Foo", "Foo: 1", "Foo: 1", True),
        ("FOO", "foo: 1", "fOO: 1", True),
        ("Foo", "Foo: 1", "Foo: 2", False),
        ("Foo", "", "", True),
        ("Foo", "", "Foo: 1", False),
        ("Foo", "Foo: 1", "", False),
        ("Foo", "", "Foo:", False),
        ("Foo", "Foo: 1, 2", "Foo: 1,2", True),
        ("Foo", "Foo: 1, 2", "Foo: 1\nFoo: 2", True),
        ("Foo", "Foo: 1, 2", "Foo: 2, 1", False),
        ("Foo", "Foo: a", "Foo: A", False),
        ("Foo", "Foo: 1", "Foo: 1\nBar: 2", True),
        ("Foo, Bar", "Foo: 1\nBar: 2", "Foo: 1\nBar: 3", False),
        ("Foo\nVary: Bar", "Foo: 1\nBar: 2", "Foo: 1\nBar: 3", False),
        ("Foo,, Bar,", "Foo: 1\nBar: 2", "Bar: 2\nFoo: 1", True),
        ("Accept-Language", "Accept-Language: en, DE", "Accept-Language: EN,de", True),
        ("Accept-Language", "Accept-Language: en; q=0.5", "Accept-Language: en;q=0.5", True),
        ("Accept-Language", "Accept-Language: en, de", "Accept-Language: de, en", False),
        ("Accept-Encoding", "Accept-Encoding: gzip, br", "Accept-Encoding: br,GZIP", True),
        ("Accept-Encoding", "Accept-Encoding: gzip", "Accept-Encoding: br", False),
    ],
)
def test_selection(vary: str, first: str, second: str, is_selected: bool) -> None:
    response = stored(f"Cache-Control: max-age=60\nVary: {vary}", request=first)
    assert response.answers(fields(first))
    assert response.answers(fields(second)) is is_selected


def test_only_what_says_so_answers_the_authorized() -> None:
    assert not stored().answers(fields("Authorization: x"))
    assert stored("Cache-Control: max-age=60, public").answers(fields("Authorization: x"))


# What a request may ask for


@pytest.mark.parametrize(
    ("response", "request_", "age", "worth"),
    [
        ("max-age=60", "", 59, Worth.SERVED),
        ("max-age=60", "", 60, Worth.STALE),
        ("max-age=60", "Cache-Control: no-cache", 1, Worth.REFUSED),
        ("max-age=60", "Pragma: no-cache", 1, Worth.REFUSED),
        ("max-age=60", "Pragma: No-Cache, x", 1, Worth.REFUSED),
        ("max-age=60", "Pragma: x", 1, Worth.SERVED),
        ("max-age=60", "Pragma: no-cache\nCache-Control: max-age=9", 1, Worth.SERVED),
        ("max-age=60", "Cache-Control: max-age=9", 9, Worth.SERVED),
        ("max-age=60", "Cache-Control: max-age=9", 10, Worth.REFUSED),
        ("max-age=60", "Cache-Control: max-age=0", 1, Worth.REFUSED),
        ("max-age=60", "Cache-Control: max-age=x", 1, Worth.REFUSED),
        ("max-age=60", "Cache-Control: max-age=99", 61, Worth.STALE),
        ("max-age=60", "Cache-Control: min-fresh=9", 51, Worth.SERVED),
        ("max-age=60", "Cache-Control: min-fresh=9", 52, Worth.REFUSED),
        ("max-age=60", "Cache-Control: min-fresh=x", 1, Worth.REFUSED),
        ("max-age=60", "Cache-Control: max-stale", 10**6, Worth.SERVED),
        ("max-age=60", "Cache-Control: max-stale=9", 69, Worth.SERVED),
        ("max-age=60", "Cache-Control: max-stale=9", 70, Worth.STALE),
        ("max-age=60", "Cache-Control: max-stale=x", 70, Worth.STALE),
        ("max-age=60, must-revalidate", "Cache-Control: max-stale", 61, Worth.STALE),
        ("max-age=60, proxy-revalidate", "Cache-Control: max-stale", 61, Worth.STALE),
        ("s-maxage=60", "Cache-Control: max-stale", 61, Worth.STALE),
        ("no-cache, max-age=60", "Cache-Control: max-stale", 1, Worth.STALE),
        ("max-age=60, stale-while-revalidate=9", "", 68, Worth.REVALIDATED),
        ("max-age=60, stale-while-revalidate=9", "", 69, Worth.STALE),
        ("max-age=60, stale-while-revalidate=9", "Cache-Control: no-cache", 61, Worth.REFUSED),
        ("max-age=60, stale-while-revalidate=9", "Cache-Control: max-age=0", 61, Worth.STALE),
        ("max-age=60, stale-while-revalidate=x", "", 61, Worth.STALE),
        ("max-age=60, stale-while-revalidate=9, must-revalidate", "", 61, Worth.STALE),
        ("s-maxage=60, stale-while-revalidate=9", "", 61, Worth.STALE),
    ],
)
def test_worth(response: str, request_: str, age: float, worth: Worth) -> None:
    kept = stored(f'Cache-Control: {response}\nETag: "a"')
    assert http.worth(kept, http.asked(fields(request_)), NOW + age) is worth


@pytest.mark.parametrize(
    ("control", "request_", "age", "serves"),
    [
        ("max-age=60, stale-if-error=9", "", 68, True),
        ("max-age=60, stale-if-error=9", "", 69, False),
        ("max-age=60", "", 60, False),
        ("max-age=60, stale-if-error=9, must-revalidate", "", 61, False),
        ("max-age=60, stale-if-error=9, proxy-revalidate", "", 61, False),
        ("s-maxage=60, stale-if-error=9", "", 61, False),
        ("max-age=60", "Cache-Control: stale-if-error=9", 68, True),
        ("max-age=60", "Cache-Control: stale-if-error=9", 69, False),
        ("max-age=60", "Cache-Control: stale-if-error=x", 61, False),
        ("max-age=60, stale-if-error=9", "Cache-Control: stale-if-error=1", 68, True),
        ("max-age=60, must-revalidate", "Cache-Control: stale-if-error=9", 61, False),
    ],
)
def test_what_stands_in_for_an_error(control: str, request_: str, age: float, serves: bool) -> None:
    assert http.serves_errors(stored(f"Cache-Control: {control}"), fields(request_), NOW + age) is serves


# Validation


@pytest.mark.parametrize(
    ("request_", "is_unmodified"),
    [
        ("", False),
        ('If-None-Match: "a"', True),
        ('If-None-Match: W/"a"', True),
        ('If-None-Match: "b"', False),
        ('If-None-Match: "b", "a"', True),
        ('If-None-Match: "b" , W/"a","c"', True),
        ('If-None-Match: "b"\nIf-None-Match: "a"', True),
        ('If-None-Match: "b, a"', False),
        ("If-None-Match: *", True),
        ("If-None-Match: a", False),
        (f"If-Modified-Since: {date(-10).decode()}", True),
        (f"If-Modified-Since: {date(5).decode()}", True),
        (f"If-Modified-Since: {date(-11).decode()}", False),
        ("If-Modified-Since: nonsense", False),
        (f'If-None-Match: "b"\nIf-Modified-Since: {date(5).decode()}', False),
    ],
)
@pytest.mark.parametrize("weak", ["", "W/"])
def test_preconditions(request_: str, weak: str, is_unmodified: bool) -> None:
    response = stored(f'ETag: {weak}"a"\nLast-Modified: {date(-10).decode()}')
    assert http.is_not_modified(fields(request_), response) is is_unmodified


def test_without_a_date_of_change_its_own_date_counts_or_when_it_came() -> None:
    dated = stored(f"Cache-Control: max-age=60\nDate: {date(-10).decode()}")
    before, then, now = (fields(f"If-Modified-Since: {date(offset).decode()}") for offset in (-11, -10, 0))
    assert [http.is_not_modified(since, dated) for since in (before, then)] == [False, True]
    assert [http.is_not_modified(since, stored()) for since in (then, now)] == [False, True]


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        ("Range: bytes=0-0", b"b"),
        ("Range: Bytes=1-2", b"od"),
        ("Range: bytes=1-", b"ody"),
        ("Range: bytes=1-99", b"ody"),
        ("Range: bytes=-1", b"y"),
        ("Range: bytes=-99", b"body"),
        ("Range: bytes=-0", b""),
        ("Range: bytes=4-", b""),
        ("Range: bytes=2-1", b""),
        ("Range: bytes=-", b""),
        ("Range: bytes=0-0,2-2", b""),
        ("Range: lines=0-0", b""),
        ("Range: bytes=0-" + "9" * 5000, b""),
        ('Range: bytes=0-0\nIf-Range: "a"', b"b"),
        ('Range: bytes=0-0\nIf-Range: "b"', b""),
        (f"Range: bytes=0-0\nIf-Range: {date(-10).decode()}", b""),
    ],
)
def test_which_part_is_asked_for(request_: str, asked: bytes) -> None:
    part = http.part(fields(request_), stored(f'ETag: "a"\nLast-Modified: {date(-10).decode()}'))
    assert bytes(b"body"[place] for place in part) == asked


def test_a_weak_tag_names_no_bytes() -> None:
    asked = fields('Range: bytes=0-0\nIf-Range: W/"a"')
    assert not http.part(asked, stored('ETag: W/"a"'))


def test_only_a_200_is_unmodified() -> None:
    assert not http.is_not_modified(fields("If-None-Match: *"), stored(status=404))


def test_a_question_to_the_origin_has_its_own_validators_only() -> None:
    both = stored(f'ETag: W/"a"\nLast-Modified: {date(-10).decode()}')
    assert http.preconditions(both) == [(b"if-none-match", b'W/"a"'), (b"if-modified-since", date(-10))]
    assert http.preconditions(stored()) == []
    kept = http.without_judged(headers("If-None-Match: x\nIf-Modified-Since: x\nRange: x\nIf-Range: x\nAccept: x"))
    assert kept == [(b"Accept", b"x")]


def test_a_304_updates_all_but_the_length_and_what_is_never_stored() -> None:
    old = stored(f"""
        Cache-Control: max-age=1
        ETag: "a"
        Date: {date(-100).decode()}
        X-Old: 1
        X-Both: 1
        X-Both: 2
        Content-Length: 4
        Content-Type: a
    """)
    new = headers("""
        Cache-Control: max-age=9
        ETag: "a"
        x-both: 3
        X-New: 1
        Content-Length: 0
        Content-Type: b
        Set-Cookie: a=b
        Connection: X-Hop
        X-Hop: 1
        Age: 2
    """)
    assert http.freshened(old, new) == headers("""
        X-Old: 1
        Content-Length: 4
        Cache-Control: max-age=9
        ETag: "a"
        x-both: 3
        X-New: 1
        Content-Type: b
        age: 2
    """)


@pytest.mark.parametrize(
    ("ours", "theirs", "is_ours"),
    [
        ('ETag: "a"', "", True),
        ('ETag: "a"', 'ETag: "a"', True),
        ('ETag: "a"', 'ETag: "b"', False),
        ('ETag: "a"', 'ETag: W/"a"', True),
        ('ETag: W/"a"', 'ETag: W/"a"', True),
        ('ETag: W/"a"', 'ETag: "a"', False),
        ("Cache-Control: max-age=1", 'ETag: "b"', True),
        ("Last-Modified: a", "Last-Modified: a", True),
        ("Last-Modified: a", "Last-Modified: b", False),
        ('ETag: "a"', "Last-Modified: b", True),
        ('ETag: "a"\nLast-Modified: a', "Last-Modified: b", False),
        ('ETag: "a"\nLast-Modified: a', 'ETag: "a"\nLast-Modified: b', True),
    ],
)
def test_which_304_is_of_a_stored_response(ours: str, theirs: str, is_ours: bool) -> None:
    assert (http.freshened(stored(ours), headers(theirs)) is not None) is is_ours


@pytest.mark.parametrize(
    ("status", "text", "is_same"),
    [
        (200, "", True),
        (200, 'Content-Length: 4\nETag: "a"', True),
        (200, "Content-Length: 5", False),
        (200, 'ETag: "b"', False),
        (200, "Last-Modified: x", False),
        (410, "", False),
    ],
)
def test_what_a_head_confirms(status: int, text: str, is_same: bool) -> None:
    assert http.is_confirmed_by_head(stored('ETag: "a"'), status, headers(text)) is is_same


# Invalidation

HERE: Target = ("http", b"a.example", "/x y/z", b"/x%20y/z", b"q=1")


@pytest.mark.parametrize(
    ("method", "status", "text", "paths"),
    [
        ("GET", 200, "Location: /other", None),
        ("OPTIONS", 200, "", None),
        ("POST", 200, "", []),
        ("PUT", 204, "", []),
        ("DELETE", 302, "", []),
        ("M-SEARCH", 200, "", []),
        ("POST", 400, "Location: /other", None),
        ("POST", 500, "", None),
        ("POST", 201, "Location: /other?b=1#top", [("/other", b"/other", b"b=1")]),
        ("POST", 201, "Location: w%20w", [("/x y/w w", b"/x%20y/w%20w", b"")]),
        ("POST", 201, "Location: http://A.example/other", [("/other", b"/other", b"")]),
        ("POST", 201, "Location: http://a.example", [("/", b"/", b"")]),
        ("POST", 201, "Location: http://b.example/other", []),
        ("POST", 201, "Location: https://a.example/other", []),
        ("POST", 201, "Location: http://[", []),
        ("POST", 200, "Location: /b\nContent-Location: /c", [("/b", b"/b", b""), ("/c", b"/c", b"")]),
    ],
)
def test_what_an_unsafe_request_makes_wrong(
    method: str, status: int, text: str, paths: list[tuple[str, bytes, bytes]] | None
) -> None:
    expected = [] if paths is None else [HERE, *((*HERE[:2], *path) for path in paths)]
    assert http.invalidated(HERE, method, status, headers(text)) == expected


# Cache-Status


def test_the_status_says_what_happened() -> None:
    assert stored().hit(NOW + 2)[-2:] == [(b"age", b"2"), (b"cache-status", b"overdrive; hit; ttl=58")]
    assert stored().hit(NOW - 2)[-2:] == [(b"age", b"0"), (b"cache-status", b"overdrive; hit; ttl=60")]
    assert http.status_of_forward(b"uri-miss") == b"overdrive; fwd=uri-miss"
    assert http.status_of_forward(b"stale", status=304, stored=True, collapsed=True) == (
        b"overdrive; fwd=stale; fwd-status=304; stored; collapsed"
    )
