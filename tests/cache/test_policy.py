"""Which responses may be stored, and the word that says why not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.cache.key import KeyPlan
from overdrive.cache.policy import Header, Policy, reason_not_to_store

POLICY = Policy(60, KeyPlan("fingerprint", headers=("accept-language", "x-tenant")))
LENGTH = (b"content-length", b"10")


def reason(*headers: Header, status: int = 200) -> str | None:
    return reason_not_to_store(status, headers, POLICY, max_body=10)


@pytest.mark.parametrize(
    "header",
    [
        (b"content-type", b"application/json"),
        (b"etag", b'"set-cookie"'),
        (b"x-set-cookie", b"a=b"),
        # Stored here, it is still asked for by browsers every time: the cache checks what it read instead.
        (b"cache-control", b"no-cache"),
        (b"cache-control", b"public, max-age=60"),
        (b"vary", b"Accept-Language, X-Tenant"),
    ],
    ids=str,
)
def test_stored(header: Header) -> None:
    assert reason(LENGTH, header) is None


@pytest.mark.parametrize("status", [100, 201, 204, 206, 301, 304, 404, 500])
def test_only_a_plain_success_is_stored(status: int) -> None:
    assert reason(LENGTH, status=status) == "status"


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ((b"set-cookie", b"session=1"), "set-cookie"),
        ((b"Set-Cookie", b"session=1"), "set-cookie"),
        ((b"cache-control", b"no-store"), "cache-control"),
        ((b"Cache-Control", b"max-age=60 ,Private"), "cache-control"),
        ((b"cache-control", b'private="x-user"'), "cache-control"),
        ((b"vary", b"*"), "vary"),
        ((b"vary", b"accept-language, cookie"), "vary"),
        ((b"Vary", b"Accept-Encoding"), "vary"),
    ],
    ids=str,
)
def test_what_a_header_forbids(header: Header, why: str) -> None:
    assert reason(LENGTH, header) == why
    assert reason(header, LENGTH) == why


def test_what_has_no_length_is_a_stream() -> None:
    assert reason() == "stream"


@pytest.mark.parametrize(("length", "why"), [(b"0", None), (b"10", None), (b"11", "size"), (b"9" * 30, "size")])
def test_size(length: bytes, why: str | None) -> None:
    assert reason((b"Content-Length", length)) == why


@pytest.mark.parametrize("length", [b"", b"ten", b"-1", b"+1", b"1_0", b"1, 1", b"\xff"])
def test_a_length_that_is_no_number_is_none(length: bytes) -> None:
    assert reason((b"content-length", length)) == "stream"


@given(st.lists(st.tuples(st.sampled_from([b"vary", b"cache-control", b"content-length"]), st.binary(max_size=8))))
def test_no_header_raises(headers: list[Header]) -> None:
    reason(*headers)
