"""Models, queries and writes at random, on each driver, for as long as there is time. A round is a schema."""

from __future__ import annotations

import random
from collections.abc import Iterator
from random import Random

import pytest
from pool.test_worlds import assert_much_was_asked
from pool.worlds import judges


# psycopg's cursors on the server, where a reading has failed half way through its rows.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("url", ["aiosqlite", "asyncpg", "psycopg"], indirect=True)
def test_what_changes_an_answer_names_something_of_it(url: str, rounds: Iterator[int]) -> None:
    with judges(url) as judge:
        for _ in rounds:
            judge(Random(random.getrandbits(64)), readings=20, writings=20)
        print(dict(judge.counts))
        assert_much_was_asked(judge)
