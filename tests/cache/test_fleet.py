"""One execution for all workers, with real ones: killed, stopped, and asked by thousands at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache.fleet import Fleet, serving

pytestmark = pytest.mark.anyio

#: Requests that each of the four workers gets at once.
EACH = 250
ALL_OF_THEM = [(200, b"7")] * EACH


@pytest.fixture
def fleet(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with serving(redis_url, tmp_path) as running:
        yield running


async def test_thousands_of_misses_are_one_execution(fleet: Fleet) -> None:
    answers = await fleet.crowd(EACH)
    fleet.open()
    assert await asyncio.gather(*answers) == [ALL_OF_THEM] * 4
    assert len(fleet.ran()) == 1


async def test_a_leader_that_is_killed_costs_one_more(fleet: Fleet) -> None:
    answers = await fleet.crowd(EACH)
    leader = fleet.worker(fleet.ran()[0])
    fleet.processes[leader].kill()
    fleet.open()
    assert [each for number, each in enumerate(await asyncio.gather(*answers)) if number != leader] == [ALL_OF_THEM] * 3
    assert len(fleet.ran()) == 2


async def test_a_leader_that_stands_still_is_not_waited_for(fleet: Fleet) -> None:
    answers = await fleet.crowd(EACH)
    leader = fleet.worker(fleet.ran()[0])
    fleet.processes[leader].send_signal(signal.SIGSTOP)
    fleet.open()
    others = [each for number, each in enumerate(answers) if number != leader]
    assert await asyncio.gather(*others) == [ALL_OF_THEM] * 3
    fleet.processes[leader].send_signal(signal.SIGCONT)
    assert await answers[leader] == ALL_OF_THEM
    # Who cannot be heard might write: nobody takes anything from Redis till then, and each process makes its own.
    assert len(fleet.ran()) == len(set(fleet.ran()))
