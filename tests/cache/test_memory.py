"""The map bounded in bytes: what it keeps is what was put, within its bound, and the frequent survive."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overdrive.cache.memory import Memory

KEYS = st.integers(0, 12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 60)),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("pop"), KEYS, st.just(0)),
        st.tuples(st.just("clear"), KEYS, st.just(0)),
    ),
    max_size=200,
)


@given(STEPS)
@settings(deadline=None)
def test_it_is_a_dict_that_may_forget(steps: list[tuple[str, int, int]]) -> None:
    memory: Memory[object] = Memory(100)
    model: dict[int, tuple[object, int]] = {}
    for step, key, size in steps:
        kept = {each: value for each, value in model.items() if each in memory._entries}
        if step == "put":
            value = object()
            if memory.put(key, value, size):
                kept[key] = value, size
                assert memory.get(key) is value
            else:
                kept.pop(key, None)
                assert memory.get(key) is None
            kept = {each: value for each, value in kept.items() if each in memory._entries}
        elif step == "get":
            assert memory.get(key) is (kept[key][0] if key in kept else None)
        elif step == "pop":
            assert memory.pop(key) is (kept.pop(key)[0] if key in kept else None)
        else:
            memory.clear()
            kept = {}
        model = kept
        assert memory._entries.keys() == model.keys()
        assert len(memory) == len(model)
        assert memory.bytes == sum(size for _, size in model.values()) <= 100


@given(STEPS)
@settings(deadline=None)
def test_nothing_is_forgotten_while_there_is_room(steps: list[tuple[str, int, int]]) -> None:
    memory: Memory[int] = Memory(13 * 60)
    model: dict[int, int] = {}
    for number, (step, key, size) in enumerate(steps):
        if step == "put":
            assert memory.put(key, number, size)
            model[key] = number
        elif step == "pop":
            assert memory.pop(key) == model.pop(key, None)
    assert {key: memory.get(key) for key in model} == model
    assert len(memory) == len(model)
    assert memory.evictions == 0


def test_what_can_never_fit_is_not_kept_and_takes_its_former_value_along() -> None:
    memory: Memory[str] = Memory(100)
    assert memory.put("other", "stays", 50)
    assert memory.put("key", "small", 50)
    assert not memory.put("key", "large", 101)
    assert memory.get("key") is None
    assert memory.get("other") == "stays"
    assert memory.evictions == 0


def test_the_frequent_survive_a_scan() -> None:
    memory: Memory[int] = Memory(100_000)
    for key in range(100):
        assert memory.put(("hot", key), key, 1000)
    for key in range(100):
        for _ in range(20):
            memory.get(("hot", key))
    # Some of the sketch's counters collide, so that a few keys of the scan seem to be used more than once.
    for key in range(1000):
        memory.put(("scan", key), key, 1000)
        if key % 10 == 0:
            for hot in range(100):
                memory.get(("hot", hot))
    assert all(memory.get(("hot", key)) == key for key in range(100))
    assert memory.evictions == 0


def test_what_comes_again_and_again_is_admitted() -> None:
    memory: Memory[int] = Memory(1000)
    for key in range(10):
        memory.put(key, key, 100)
    assert not memory.put("new", 1, 100)
    assert memory.put("new", 2, 100)
    assert memory.get("new") == 2
    assert (len(memory), memory.bytes, memory.evictions) == (10, 1000, 1)


def test_a_large_entry_takes_the_place_of_several() -> None:
    memory: Memory[int] = Memory(1000)
    for key in range(10):
        memory.put(key, key, 100)
    memory.put("large", 1, 450)
    assert memory.put("large", 2, 450)
    assert (len(memory), memory.bytes, memory.evictions) == (6, 950, 5)


def test_what_was_dear_long_ago_gives_way() -> None:
    memory: Memory[int] = Memory(10)
    memory.put("old", 1, 10)
    for _ in range(1000):
        memory.get("old")
    for key in range(5 * 256):
        memory.put(("once", key % 200), key, 10)
    assert memory.get("old") is None


@pytest.mark.parametrize("seed", range(3))
def test_a_skewed_load_is_served_better_than_the_latest_used_would(seed: int) -> None:
    chosen = random.Random(seed)
    keys = [int(chosen.paretovariate(0.6)) for _ in range(20_000)]
    memory: Memory[int] = Memory(50 * 300)
    latest: dict[int, None] = {}
    hits = latest_hits = 0
    for key in keys:
        if memory.get(key) is None:
            memory.put(key, key, 300)
        else:
            hits += 1
        latest_hits += key in latest
        latest.pop(key, None)
        latest[key] = None
        if len(latest) > 50:
            del latest[next(iter(latest))]
    assert hits > latest_hits
