"""Different inputs, different keys; the same inputs in another order or spelling, the same key."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from overdrive.cache.key import KeyPlan, key_of

#: Few characters, so that what separates the parts of a key is often among them.
texts = st.text("ab=&:/?;,|\0% \"'é", max_size=4)
pairs = st.lists(st.tuples(texts, texts), max_size=4)
values = st.lists(texts | st.none(), min_size=2, max_size=2)
inputs = st.fixed_dictionaries(
    {
        "host": texts,
        "path": texts,
        "query": pairs.map(urlencode),
        "headers": values,
        "cookies": values,
    }
)
PLAN = KeyPlan("fingerprint", ("x-a", "x-b"), ("c", "d"))


def key(plan: KeyPlan = PLAN, **given: Any) -> str:
    none = [None, None]
    return key_of(plan, **{"host": "h", "path": "/", "query": "", "headers": none, "cookies": none, **given})


def meaning(given: dict[str, Any]) -> Any:
    """What an endpoint can tell of a request: of equal parameters the order, of different ones none."""
    parameters: dict[str, list[str]] = {}
    for name, value in parse_qsl(given["query"], keep_blank_values=True):
        parameters.setdefault(name, []).append(value)
    return {**given, "host": given["host"].lower(), "query": parameters}


@given(inputs, inputs)
def test_keys_are_equal_where_the_meaning_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (key(**one) == key(**other)) == (meaning(one) == meaning(other))


@given(inputs, st.sampled_from(["host", "path", "query", "headers", "cookies"]), st.data())
def test_every_part_tells(given_: dict[str, Any], part: str, data: st.DataObject) -> None:
    other = {**given_, part: data.draw(inputs)[part]}
    assume(meaning(given_) != meaning(other))
    assert key(**given_) != key(**other)


@given(pairs, st.randoms())
def test_order_of_different_parameters_does_not_matter(parameters: list[tuple[str, str]], random: Any) -> None:
    parameters = list(dict(parameters).items())
    shuffled = random.sample(parameters, len(parameters))
    assert key(query=urlencode(parameters)) == key(query=urlencode(shuffled))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"query": "a=1:b=2"}, {"query": "a=1&b=2"}),
        ({"query": "a=1&a=2"}, {"query": "a=2"}),
        ({"query": "a=1&a=2"}, {"query": "a=2&a=1"}),
        ({"query": "a=1&a=2"}, {"query": "a=1,2"}),
        ({"query": "a="}, {"query": ""}),
        ({"query": "a=%26b%3D2"}, {"query": "a=&b=2"}),
        ({"path": "/a:b"}, {"path": "/a/b"}),
        ({"path": "/x"}, {"path": "/api/x"}),
        ({"path": "/X"}, {"path": "/x"}),
        ({"path": "/a", "query": "b=1"}, {"path": "/a?b=1"}),
        ({"host": "ab", "path": "c"}, {"host": "a", "path": "bc"}),
        ({"headers": [None, None]}, {"headers": ["", None]}),
        ({"headers": ["a", None]}, {"headers": [None, "a"]}),
        ({"headers": ["a", None]}, {"cookies": ["a", None]}),
        ({"headers": ["A", None]}, {"headers": ["a", None]}),
    ],
    ids=str,
)
def test_close_calls_differ(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(**one) != key(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"query": "a=1&b=2"}, {"query": "b=2&a=1"}),
        ({"query": "b=2&a=1&a=3"}, {"query": "a=1&b=2&a=3"}),
        ({"query": "a=%31"}, {"query": "a=1"}),
        ({"query": "a"}, {"query": "a="}),
        ({"host": "Example.ORG"}, {"host": "example.org"}),
    ],
    ids=str,
)
def test_spellings_of_one_thing_do_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(**one) == key(**other)


def test_releases_of_a_route_differ() -> None:
    assert key(KeyPlan("one")) != key(KeyPlan("other"))


@given(st.binary(max_size=20))
@example(b"a=%ff&%zz=\xff")
def test_any_query_string_has_a_key(query: bytes) -> None:
    assert len(key(query=query.decode("latin-1"))) == 32
