"""Walks beside the plain list, and while others write, for as long as there is time. A round is 250 walks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagination.cases import Walk, Walker, walks
from sqlalchemy import create_engine

generated = settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=["sqlite", "postgresql"])
def walker(request: pytest.FixtureRequest) -> Iterator[Walker]:
    url = "sqlite://"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url").replace("asyncpg", "psycopg")
    made = Walker(create_engine(url))
    yield made
    made.close()


def test_walks(walker: Walker, rounds: Iterator[int]) -> None:
    @generated
    @given(walks(1000))
    def check(walk: Walk) -> None:
        walker.check(walk)

    for _ in rounds:
        check()


def test_walks_under_writes(walker: Walker, rounds: Iterator[int]) -> None:
    @generated
    @given(walks(1000), st.randoms(use_true_random=False))
    def check(walk: Walk, generator: random.Random) -> None:
        walker.check_under_writes(walk, generator)

    for _ in rounds:
        check()
