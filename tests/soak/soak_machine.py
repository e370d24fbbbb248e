"""Requests of three workers, interleaved in every way that there is time for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache.machine import run, workers
from cache.test_machine import in_haste as in_haste


@pytest.mark.parametrize("consistency", ["bounded", "strict"])
def test_nothing_stale_is_answered(consistency: str, postgres_url: str, redis_url: str, rounds: Iterator[int]) -> None:
    with workers(postgres_url, redis_url, consistency=consistency) as machine:
        for _ in rounds:
            run(machine, examples=20)
