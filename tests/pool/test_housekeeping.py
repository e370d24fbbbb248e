"""Who calls when something is due, where there is no event loop."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref

import pytest
from support import eventually

from overdrive.pool.housekeeping import Housekeeper

pytestmark = pytest.mark.anyio


class Pool:
    def __init__(self) -> None:
        self.called: list[float] = []
        self.has_been = threading.Event()

    def tick(self) -> None:
        self.called.append(time.monotonic())
        self.has_been.set()

    def fail(self) -> None:
        raise ValueError("of this pool")


async def test_each_is_called_once_at_the_time_it_was_last_told() -> None:
    housekeeper, first, second = Housekeeper(), Pool(), Pool()
    now = time.monotonic()
    housekeeper.call_at(now + 60, first.tick)
    # It waits for that now.
    await asyncio.sleep(0.05)
    now += 0.05
    housekeeper.call_at(now + 0.02, second.tick)
    housekeeper.call_at(now + 0.01, first.tick)
    await eventually(lambda: not housekeeper.is_running)
    assert len(first.called) == len(second.called) == 1
    assert now + 0.01 <= first.called[0]
    assert now + 0.02 <= second.called[0]


async def test_who_fails_is_told_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    housekeeper, pool = Housekeeper(), Pool()
    housekeeper.call_at(0, pool.fail)
    housekeeper.call_at(0, pool.tick)
    await eventually(lambda: not housekeeper.is_running)
    assert pool.called
    assert "of this pool" in caplog.text
    housekeeper.call_at(0, pool.tick)
    assert pool.has_been.wait(5)


async def test_nobody_is_kept_alive() -> None:
    housekeeper, called, waiting = Housekeeper(), Pool(), Pool()
    housekeeper.call_at(time.monotonic() + 0.5, waiting.tick)
    housekeeper.call_at(0, called.tick)
    assert called.has_been.wait(5)
    left = [weakref.ref(called), weakref.ref(waiting)]
    del called, waiting
    await eventually(lambda: not any(each() for each in left))
    assert housekeeper.is_running
    await eventually(lambda: not housekeeper.is_running)
