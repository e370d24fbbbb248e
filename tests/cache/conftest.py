"""The two stores, and a service on each store and each driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from cache.cluster import RedisCluster, redis_cluster
from cache.service import Service, serve


@pytest.fixture(autouse=True)
def patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not a Redis that is late, but where being late is what is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_store_away":
        monkeypatch.setattr("overdrive.cache.connection.PATIENCE", 5.0)
        monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 10.0)
        monkeypatch.setattr("overdrive.cache.member._LEASE", 3600.0)
        monkeypatch.setattr("overdrive.cache.member._INTERVAL", 600.0)


@pytest.fixture(scope="session")
def cluster_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A Redis Cluster for the whole run."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_servers: RedisCluster) -> RedisCluster:
    """An empty Redis Cluster for one test."""
    cluster_servers.flush()
    return cluster_servers


@pytest.fixture(params=["memory", "redis"])
def store_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Where the entries are: a Redis URL, or None for the process itself."""
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


@pytest.fixture(params=["memory", "redis", "cluster"])
def stores_url(request: pytest.FixtureRequest) -> str | None:
    """The same, and a cluster."""
    match request.param:
        case "redis":
            url: str = request.getfixturevalue("redis_url")
            return url
        case "cluster":
            return request.getfixturevalue("cluster").url
    return None


@pytest.fixture
async def service(sqlite_url: str, store_url: str | None) -> AsyncIterator[Service]:
    """The app over each store."""
    async with serve(sqlite_url, store_url) as running:
        yield running


@pytest.fixture
async def on_each_driver(url: str) -> AsyncIterator[Service]:
    """The app over each driver, with the store inside the process."""
    async with serve(url) as running:
        yield running
