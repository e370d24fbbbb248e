"""What a stored response is worth, and its written form."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overdrive.cache.entry import FORMAT, Entry, Form, State, decode, encode

ENTRY = Entry(FORMAT, "f", "epoch", {"default/items": 3, "default/*": 0}, 100.0, 60.0, 200, [(b"a", b"b")], b"body")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
stamps = st.integers(0, 2**53)
seconds = st.floats(0, 1e12)
headers = st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=3)
entries = st.builds(
    Entry,
    format=st.just(FORMAT),
    fingerprint=texts,
    epoch=texts,
    versions=st.dictionaries(texts, stamps, max_size=3),
    created=seconds,
    ttl=seconds,
    status=st.integers(100, 599),
    headers=headers,
    body=st.binary(max_size=50),
    gzipped=st.none() | st.builds(Form, headers=headers, body=st.binary(max_size=50)),
)


@pytest.mark.parametrize(
    ("now", "epoch", "changed", "state"),
    [
        (100.0, "epoch", {}, State.FRESH),
        (159.9, "epoch", {}, State.FRESH),
        (159.9, "epoch", {"default/others": 9}, State.FRESH),
        (160.0, "epoch", {}, State.EXPIRED),
        (100.0, "epoch", {"default/items": 4}, State.INVALIDATED),
        # A stamp that went back is one that was forgotten.
        (100.0, "epoch", {"default/items": 2}, State.INVALIDATED),
        (100.0, "epoch", {"default/*": 4}, State.INVALIDATED),
        (160.0, "epoch", {"default/items": 4}, State.INVALIDATED),
        (100.0, "other", {}, State.INVALIDATED),
        (160.0, "other", {}, State.INVALIDATED),
    ],
)
def test_state(now: float, epoch: str, changed: dict[str, int], state: State) -> None:
    assert ENTRY.state(now, epoch, {**ENTRY.versions, **changed}) is state


@pytest.mark.parametrize("now", [100.0, 160.0])
@pytest.mark.parametrize("missing", list(ENTRY.versions))
def test_a_missing_stamp_is_not_an_unchanged_one(missing: str, now: float) -> None:
    versions = {tag: stamp for tag, stamp in ENTRY.versions.items() if tag != missing}
    assert ENTRY.state(now, "epoch", versions) is State.INVALIDATED


@given(entries, seconds, texts, st.dictionaries(texts, stamps, max_size=3))
def test_invalidation_comes_before_expiry(entry: Entry, now: float, epoch: str, changed: dict[str, int]) -> None:
    versions = {**entry.versions, **changed}
    same = epoch == entry.epoch and all(versions[tag] == stamp for tag, stamp in entry.versions.items())
    state = entry.state(now, epoch, versions)
    assert (state is State.INVALIDATED) == (not same)
    if same:
        assert (state is State.FRESH) == (now - entry.created < entry.ttl)


@given(entries)
def test_round_trip(entry: Entry) -> None:
    assert decode(encode(entry), entry.fingerprint) == entry


@given(entries, st.integers(min_value=0))
def test_half_of_an_entry_is_none(entry: Entry, cut: int) -> None:
    data = encode(entry)
    assert decode(data[: cut % len(data)], entry.fingerprint) is None


@given(entries, st.integers(min_value=0), st.integers(0, 255))
def test_damage_never_raises(entry: Entry, at: int, byte: int) -> None:
    data = bytearray(encode(entry))
    data[at % len(data)] = byte
    found = decode(bytes(data), entry.fingerprint)
    assert found is None or found.fingerprint == entry.fingerprint


@given(st.binary(max_size=50))
@example(encode(ENTRY).replace(b"\xa1f", b"\xa1\xff"))
@example(encode(ENTRY) + b"\0")
@example(msgspec.msgpack.encode([[]]))
def test_what_is_no_entry_is_none(data: bytes) -> None:
    assert decode(data, "f") is None


@pytest.mark.parametrize(
    "other", [{"format": FORMAT + 1}, {"format": FORMAT - 1}, {"fingerprint": "g"}, {"fingerprint": ""}], ids=str
)
def test_another_format_or_release_is_none(other: dict[str, object]) -> None:
    assert decode(encode(msgspec.structs.replace(ENTRY, **other)), "f") is None
