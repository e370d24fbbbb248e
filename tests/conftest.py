"""Real servers for all tests: a server that does not come up is an error, never a skipped test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from redis import Redis
from shell import Command, shell

from overdrive.demo import servers

_databases = count(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server_directory() -> Iterator[Path]:
    """An empty directory that a server of another account reaches, for one test."""
    with _directory() as directory:
        yield directory


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server for the whole run, as a `postgresql://` URL of its maintenance database."""
    with _directory() as directory, servers.postgres(directory) as url:
        yield url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """A Redis server for the whole run, as a `redis://` URL."""
    with _directory() as directory, servers.redis(directory) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_url(postgres_server: str) -> Iterator[str]:
    """One database for the whole run, as a `postgresql+asyncpg://` URL: what tests write there stays."""
    yield from _database(postgres_server)


@pytest.fixture
def postgres_database(postgres_server: str) -> Iterator[str]:
    """An empty database for one test, as a `postgresql+asyncpg://` URL."""
    yield from _database(postgres_server)


@pytest.fixture(scope="session")
def overdrive() -> Iterator[Command]:
    """The `overdrive` command."""
    with shell() as command:
        yield command


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """An empty Redis database for one test."""
    with Redis.from_url(redis_server) as client:
        client.flushdb()
        yield redis_server
        client.flushdb()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file for one test, as a `sqlite+aiosqlite://` URL."""
    return f"sqlite+aiosqlite:///{tmp_path / 'test.sqlite'}"


@pytest.fixture(params=["aiosqlite", "asyncpg", "psycopg"])
def url(request: pytest.FixtureRequest) -> str:
    """A database under each async driver in turn; `support.tables` empties it."""
    if request.param == "aiosqlite":
        return request.getfixturevalue("sqlite_url")
    return request.getfixturevalue("postgres_url").replace("asyncpg", request.param)


@contextmanager
def _directory() -> Iterator[Path]:
    # Not pytest's own: under root PostgreSQL runs as another account, to which those are closed.
    with tempfile.TemporaryDirectory(prefix="overdrive-") as directory:
        yield Path(directory)


def _database(server: str) -> Iterator[str]:
    name = f"test_{next(_databases)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield server.replace("postgresql://", "postgresql+asyncpg://").removesuffix("/postgres") + f"/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
