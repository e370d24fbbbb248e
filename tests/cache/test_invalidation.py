"""Commits become stamps, also when the store was away at the time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

import pytest
from cache.exchanges import ITEMS, ask

from overdrive.cache.cache import Cache
from overdrive.cache.store import MemoryStore, StoreUnavailable
from overdrive.pool.observe import Outcome

pytestmark = pytest.mark.anyio

WRITES = frozenset((ITEMS,))


class Faulty(MemoryStore):
    """Forgets nothing, and does not hear of writes while `deaf`."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False
        self.bumps: list[set[str]] = []

    async def bump(self, tags: Collection[str], writer: str = "") -> None:
        if self.deaf:
            raise StoreUnavailable("deaf")
        self.bumps.append(set(tags))
        await super().bump(tags, writer)


@pytest.fixture
def store() -> Faulty:
    return Faulty()


@pytest.fixture
def cache(store: Faulty) -> Cache:
    return Cache(store)


async def committed(cache: Cache) -> None:
    await cache.invalidator.after(await cache.invalidator.before(WRITES, ""), Outcome.COMMITTED)


@pytest.mark.parametrize(
    ("deaf", "outcome", "mark"),
    [
        (False, Outcome.COMMITTED, "miss"),
        (False, Outcome.UNKNOWN, "miss"),
        (True, Outcome.COMMITTED, "miss"),
        (True, Outcome.UNKNOWN, "miss"),
        (True, Outcome.ROLLED_BACK, "hit"),
    ],
)
async def test_what_may_have_been_committed_is_announced(
    cache: Cache, store: Faulty, deaf: bool, outcome: Outcome, mark: str
) -> None:
    await ask(cache)
    store.deaf = deaf
    write = await cache.invalidator.before(WRITES, "")
    store.deaf = False
    await cache.invalidator.after(write, outcome)
    assert await ask(cache) == mark


@pytest.mark.parametrize(
    ("tags", "bumped"),
    [
        (("items",), {ITEMS, "default/items#", "dropped/default/items"}),
        (
            ("reports/items", "*"),
            {
                *("reports/items", "reports/items#", "dropped/reports/items"),
                *("default/*", "default/*#", "dropped/default/*"),
            },
        ),
    ],
)
async def test_invalidate_names_tables(cache: Cache, store: Faulty, tags: tuple[str, ...], bumped: set[str]) -> None:
    await cache.invalidate(*tags)
    assert store.bumps == [bumped]


async def test_nothing_is_served_over_an_unannounced_write(
    cache: Cache, store: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(cache)
    store.deaf = True
    with caplog.at_level(logging.ERROR, "overdrive"):
        await committed(cache)
    assert "could not be told of a write" in caplog.text
    assert [await ask(cache), await ask(cache, "never written")] == ["bypass", "bypass"]
    store.deaf = False
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_writes_that_wait_are_announced_together_and_once(cache: Cache, store: Faulty) -> None:
    store.deaf = True
    await committed(cache)
    await cache.invalidate("others")
    store.deaf = False
    await ask(cache)
    await cache.invalidate("last")
    assert store.bumps == [
        {ITEMS, "default/others", "default/others#", "dropped/default/others"},
        {"default/last", "default/last#", "dropped/default/last"},
    ]


async def test_a_write_during_the_announcement_of_another_is_not_lost(cache: Cache, store: Faulty) -> None:
    """To the same table: the first announcement speaks for the first write alone."""
    await ask(cache)
    announcing, go_on = asyncio.Event(), asyncio.Event()
    bump = store.bump

    async def lingering(tags: Collection[str], writer: str) -> None:
        await bump(tags, writer)
        announcing.set()
        await go_on.wait()

    store.bump = lingering  # type: ignore[method-assign]
    first = asyncio.create_task(cache.invalidate("items"))
    await announcing.wait()
    store.bump, store.deaf = bump, True  # type: ignore[method-assign]
    await cache.invalidate("items")
    go_on.set()
    await first
    assert await ask(cache) == "bypass"
    store.deaf = False
    await ask(cache)
    assert len(store.bumps) == 2
