"""Databases to walk through, kept for a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pagination.cases import Walker
from sqlalchemy import create_engine


@pytest.fixture(scope="module")
def postgres_walker(postgres_url: str) -> Iterator[Walker]:
    walker = Walker(create_engine(postgres_url.replace("asyncpg", "psycopg")))
    yield walker
    walker.close()


@pytest.fixture(scope="module")
def lite_walker() -> Iterator[Walker]:
    walker = Walker(create_engine("sqlite://"))
    yield walker
    walker.close()
