"""Whatever the models, the query and the write are: if the write changes the answer, it names something of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool.worlds import Judge, judges


@pytest.mark.parametrize("url", ["aiosqlite", "asyncpg"], indirect=True)
def test_what_changes_an_answer_names_something_of_it(url: str) -> None:
    with judges(url) as judge:

        @settings(max_examples=2, deadline=None, database=None)
        @given(st.randoms(use_true_random=True))
        def asked(rng: Random) -> None:
            judge(rng, readings=10, writings=10)

        asked()
        assert_much_was_asked(judge)


def assert_much_was_asked(judge: Judge) -> None:
    """Most of what is made up makes sense, is told apart, and is changed now and then."""
    counts = judge.counts
    assert counts["reading"] > 10 * counts["unknown"]
    assert min(counts["reading"], counts["writing"], counts["changed"], counts["kept"]) > 0
