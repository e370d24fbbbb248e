"""How two responses differ: found whatever it is, and told without what is in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.cache.compare import differences

JSON = [(b"Content-Type", b"application/json")]
#: What is in a document, and must not be in what is told of it.
MARKER = "zQxj"

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(10_000_000, 10_000_100)
    | st.floats(1e12, 1e13)
    | st.text("ab", max_size=2).map(MARKER.__add__),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", MARKER, "b" + MARKER]), inner),
    max_leaves=12,
)


def compare(kept: Any, now: Any, declared: tuple[str, ...] = ("name", "items")) -> list[str]:
    return differences((200, 200), (JSON, JSON), (json.dumps(kept).encode(), json.dumps(now).encode()), declared)


@given(values, values)
def test_values_and_undeclared_names_are_never_told(kept: Any, now: Any) -> None:
    found = compare(kept, now)
    assert len(found) <= 10
    text = "".join(found)
    assert MARKER not in text
    assert not any(number in text for number in ("10000", "e+", "null", "true"))
    assert all(each.split()[0].startswith("$") and len(each.split()[0]) <= 200 for each in found)


@given(values, values)
def test_there_is_a_difference_exactly_where_the_texts_say_something_else(kept: Any, now: Any) -> None:
    # In Python, unlike in JSON, True is 1; in both 1.0 is.
    different = json.dumps(kept, sort_keys=True) != json.dumps(now, sort_keys=True)
    assert bool(compare(kept, now)) == different


@given(values)
def test_spaces_and_the_order_of_names_are_no_difference(value: Any) -> None:
    texts = json.dumps(value).encode(), json.dumps(value, indent=1, sort_keys=True).encode()
    assert differences((200, 200), (JSON, JSON), texts) == []


def test_each_kind() -> None:
    kept = {"items": [{"name": 1}, {"name": 2}, {"name": True}], "ids": {"ada": 1}, "name": None}
    now = {"items": [{"name": 1}, {"name": 3}, {"name": 1}, {}], "ids": {"bob": 1, "ada": "x"}}
    assert compare(kept, now) == [
        "$.items[1].name changed",
        "$.items[2].name type",
        "$.items[3] added",
        "$.*.* type",
        "$.*.* added",
        "$.name removed",
    ]


def test_what_is_told_is_bounded() -> None:
    assert len(compare(list(range(50)), list(range(1, 51)))) == 10
    deep: Any = 1
    other: Any = 2
    for _ in range(100):
        deep, other = {"items": deep}, {"items": other}
    [found] = compare(deep, other)
    assert len(found) == len(" changed") + 200
    assert found.endswith("… changed")


@pytest.mark.parametrize(
    ("status", "kept", "now", "found"),
    [
        (404, b"1", b"1", ["status"]),
        (200, b"a", b"b", ["body"]),
        (200, b"\xff", b"1", ["body"]),
        (200, b"[" * 100_000, b"1", ["body"]),
        (200, b"[NaN, 1]", b"[NaN,1]", []),
        (200, b"1.0", b"1", []),
    ],
)
def test_what_is_no_json(status: int, kept: bytes, now: bytes, found: list[str]) -> None:
    assert differences((200, status), (JSON, JSON), (kept, now)) == found


def test_another_content_type() -> None:
    assert differences((200, 200), (JSON, [(b"content-type", b"text/plain")]), (b"1", b"1")) == ["content-type"]
    assert differences((200, 200), (JSON, [(b"content-type", b"application/json"), (b"x", b"1")]), (b"1", b"1")) == []
