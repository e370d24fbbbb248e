"""Ten thousand misses at once, and leaders that are killed, for as long as there is time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache.fleet import serving
from redis import Redis

pytestmark = pytest.mark.anyio

#: Requests that each of the four workers gets at once.
EACH = 2500


async def test_ten_thousand_misses(redis_url: str, tmp_path: Path, rounds: Iterator[int]) -> None:
    for _ in rounds:
        with Redis.from_url(redis_url) as server:
            server.flushdb()
        with serving(redis_url, tmp_path) as fleet:
            answers = await fleet.crowd(EACH)
            leader, killed = fleet.worker(fleet.ran()[0]), random.random() < 0.5
            if killed:
                fleet.processes[leader].kill()
            fleet.open()
            for number, each in enumerate(await asyncio.gather(*answers)):
                if not killed or number != leader:
                    assert each == [(200, b"7")] * EACH
            assert len(fleet.ran()) == (2 if killed else 1)
