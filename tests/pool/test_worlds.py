"""Whatever the models, the query and the write are: if the write changes the answer, it names something of it."""

from __future__ import annotations

from random import Random

import pytest
from pool.worlds import Judge, judges


@pytest.mark.parametrize("url", ["aiosqlite", "asyncpg"], indirect=True)
def test_what_changes_an_answer_names_something_of_it(url: str) -> None:
    with judges(url) as judge:
        # Here always the same ones; `make soak` makes up others.
        for seed in range(2):
            judge(Random(seed), readings=10, writings=10)
        assert_much_was_asked(judge)


def assert_much_was_asked(judge: Judge) -> None:
    """Most of what is made up makes sense, is told apart, and is changed now and then."""
    counts = judge.counts
    assert counts["reading"] > 10 * counts["unknown"]
    assert min(counts["reading"], counts["writing"], counts["changed"], counts["kept"]) > 0
