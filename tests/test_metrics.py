"""What is told of a service: by which names, with which labels, and how much."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cache.conftest import patient as patient
from cache.service import Service
from fastapi import FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import create_async_engine
from support import Item, client, eventually, tables

from overdrive import CursorPage, LogHandler, Overdrive, SessionDep, cached, paginate
from overdrive.errors import ConfigurationError
from overdrive.instrumentation.numbers import BOUNDS, Histogram
from overdrive.metrics import METRICS, Exporter, Reading, of_cache, prometheus_name

pytestmark = pytest.mark.anyio

Numbers = dict[tuple[str, frozenset[tuple[str, str]]], float]


@asynccontextmanager
async def serving(url: str, **options: Any) -> AsyncIterator[Service]:
    with tables(url) as database:
        app = FastAPI()
        overdrive = Overdrive(app, database_url=url, cache=True, **options)
        app.include_router(overdrive.metrics_router())

        @app.get("/names/{number}")
        @cached
        async def names(number: int, db: SessionDep) -> list[str]:
            return list(await db.scalars(select(Item.name).where(Item.id < number)))

        @app.get("/pages", response_model=CursorPage[int])
        async def pages(db: SessionDep) -> Any:
            return await paginate(db, select(Item.id).order_by(Item.id))

        async with client(app) as http:
            yield Service(app, overdrive, http, database)
        await overdrive.aclose()


async def scrape(http: httpx2.AsyncClient) -> Numbers:
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for each in families for sample in each.samples
    }


def total(numbers: Numbers, name: str, /, **labels: str) -> float:
    return sum(value for (each, own), value in numbers.items() if each == name and labels.items() <= set(own))


async def test_what_is_told(url: str, tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    logging.getLogger("overdrive.request").addHandler(handler)
    try:
        async with serving(url) as service:
            for number in (1, 1, 2, 1):
                await service.get(f"/names/{number}?since={number}")
            await service.get("/pages")
            numbers = await scrape(service.http)
    finally:
        logging.getLogger("overdrive.request").removeHandler(handler)
        handler.close()
    assert total(numbers, "overdrive_cache_hits_total", stage="before_fastapi") == 2
    assert total(numbers, "overdrive_cache_misses_total", reason="absent", http_route="/names/{number}") == 2
    assert total(numbers, "overdrive_cache_stores_total", http_request_method="GET") == 2
    assert total(numbers, "overdrive_cache_stored_bytes_total") == len("[]") * 2
    assert total(numbers, "overdrive_cache_entries") == 2
    assert total(numbers, "overdrive_cache_memory_bytes") > 0
    assert total(numbers, "overdrive_pages_total", style="cursor") >= 1
    pool = {"db_client_connection_pool_name": "default"}
    assert total(numbers, "db_client_connection_count", db_client_connection_state="idle", **pool) == 1
    assert total(numbers, "db_client_connection_max", **pool) == 30
    assert total(numbers, "db_client_connection_create_time_seconds_count", **pool) == 1
    # The page and two misses.
    assert total(numbers, "db_client_connection_wait_time_seconds_count", **pool) == 3
    assert total(numbers, "db_client_connection_wait_time_seconds_bucket", le="0.001", **pool) >= 2
    assert total(numbers, "db_client_connection_use_time_seconds_count", **pool) == 3
    assert total(numbers, "db_client_connection_use_time_seconds_sum", **pool) > 0


async def test_no_label_is_a_clients(sqlite_url: str) -> None:
    async with serving(sqlite_url) as service:
        for number in range(1, 4):
            await service.get(f"/names/{number}?q={number}", headers={"host": f"host{number}"})
        await service.get("/nowhere/7")
        before = await scrape(service.http)
        for number in range(10, 30):
            await service.get(f"/names/{number}")
            await service.get(f"/nowhere/{number}")
        after = await scrape(service.http)
    assert before.keys() == after.keys()
    assert {value for _, labels in after for name, value in labels if name == "http_route"} == {"/names/{number}"}


async def test_both_formats_have_what_there_is(sqlite_url: str) -> None:
    async with serving(sqlite_url) as service:
        await service.get("/names/1")
        service.overdrive.sources["admission"] = lambda: {"default": {"limit": 7, "refused_full": 2}}
        service.overdrive.sources["jobs"] = lambda: {"done_total": 3}
        numbers = await scrape(service.http)
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        answer = await service.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics(answer.text)}
    for name, metric in METRICS.items():
        if (family := families.get(prometheus_name(name))) is not None:
            assert (family.type, family.documentation) == (metric.kind, metric.help)
    assert families["db_client_connection_wait_time_seconds"].type == "histogram"
    assert total(numbers, "overdrive_admission_limit", name="default") == 7
    assert total(numbers, "overdrive_admission_refused_full_total") == 2
    assert total(numbers, "overdrive_jobs_done_total") == 3


def test_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.metrics import db_metrics

    known = {value for name, value in vars(db_metrics).items() if name.startswith("DB_CLIENT_CONNECTION_")}
    ours = {name for name in METRICS if not name.startswith("overdrive.")}
    assert ours <= known
    for name in METRICS:
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)
        assert re.fullmatch(r"[a-z][a-z_]*", prometheus_name(name))


def test_a_duration_is_counted_once_up_to_its_bound() -> None:
    histogram = Histogram()
    for seconds in (0, *BOUNDS, 11):
        histogram.note(seconds)
    assert histogram.counts == [2, *[1] * len(BOUNDS)]
    assert histogram.sum == pytest.approx(sum(BOUNDS) + 11)


async def test_scraping_disturbs_nobody(sqlite_url: str) -> None:
    async with serving(sqlite_url) as service:
        paths = [f"/names/{number % 5 + 1}" if number % 2 else "/metrics" for number in range(200)]
        answers = await asyncio.gather(*map(service.get, paths))
        assert {answer.status_code for answer in answers} == {200}
        assert total(await scrape(service.http), "overdrive_cache_hits_total") >= 50


async def test_opentelemetry_reads_the_same(sqlite_url: str) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    async with serving(sqlite_url) as service:
        service.overdrive.instrument(provider)
        for _ in range(3):
            await service.get("/names/1")
        data: Any = reader.get_metrics_data()
        metrics = {
            each.name: each for of in data.resource_metrics for scope in of.scope_metrics for each in scope.metrics
        }
    provider.shutdown()
    stages = {point.attributes["stage"]: point.value for point in metrics["overdrive.cache.hits"].data.data_points}
    assert stages == {"before_fastapi": 2, "before_routing": 0, "after_dependencies": 0}
    states = {
        point.attributes["db.client.connection.state"]: point.value
        for point in metrics["db.client.connection.count"].data.data_points
    }
    assert states["idle"] == 1
    assert metrics["db.client.connection.count"].unit == "{connection}"
    waits = metrics["db.client.connection.wait_time.count"].data
    assert [point.value for point in waits.data_points] == [1]
    assert waits.is_monotonic


async def test_of_redis_and_of_a_pool_that_is_not_ours(sqlite_url: str, redis_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    async with serving(sqlite_url, redis_url=redis_url, engine=engine) as service:
        await service.get("/names/1")
        await service.get("/names/1")
        numbers = await scrape(service.http)
    await engine.dispose()
    assert total(numbers, "overdrive_cache_redis_trips_total") >= 3
    assert total(numbers, "overdrive_cache_redis_answered_total") >= 2
    assert total(numbers, "overdrive_cache_entries") == 1
    assert total(numbers, "db_client_connection_count", db_client_connection_state="idle") == 1
    assert not total(numbers, "db_client_connection_max")


async def test_how_writes_are_heard_of(sqlite_url: str, redis_url: str) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    async with serving(sqlite_url, redis_url=redis_url) as service:
        store = service.overdrive.cache.store
        # Nobody has told it anything yet.
        assert modes(await scrape(service.http)) == {"pubsub": 0, "none": 1}
        await service.get("/names/1")
        await eventually(lambda: heard(store)[0] == "pubsub")
        for _ in range(2):
            async with service.overdrive.session() as db:
                db.add(Item(name="new"))
        # A commit is told of when it is marked, and not again when it is settled; a clear is no write.
        await service.overdrive.cache.clear()
        await service.overdrive.cache.invalidate("others")
        await eventually(lambda: heard(store)[1] == 3)
        numbers = await scrape(service.http)
        assert modes(numbers) == {"pubsub": 1, "none": 0}
        assert total(numbers, "overdrive_cache_push_lag_seconds_count") == 3
        assert total(numbers, "overdrive_cache_push_lag_seconds_sum") > 0
        service.overdrive.instrument(provider)
        data: Any = reader.get_metrics_data()
        async with Redis.from_url(redis_url) as redis:
            await redis.client_kill_filter(_type="pubsub", skipme=True)
        await eventually(lambda: heard(store)[0] == "none")
    provider.shutdown()
    points = {
        (each.name, *point.attributes.values()): point.value
        for of in data.resource_metrics
        for scope in of.scope_metrics
        for each in scope.metrics
        for point in each.data.data_points
    }
    assert (points["overdrive.cache.push", "pubsub"], points["overdrive.cache.push_lag.count",]) == (1, 3)


async def test_each_part_tells_its_numbers(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log")
    try:
        async with serving(postgres_url, redis_url=redis_url) as service:
            for path in ("/names/1", "/names/1", "/pages"):
                await service.get(path)
            await eventually(lambda: heard(service.overdrive.cache.store)[0] == "pubsub")
            told = {name for name, _ in await scrape(service.http)}
    finally:
        handler.close()
    cache = (
        "hits_total",
        "misses_total",
        "stored_bytes_total",
        "memory_bytes",
        "evictions_total",
        "mismatches_total",
        "tags",
    )
    pool = ("wait_time_seconds_bucket", "use_time_seconds_bucket", "pending_requests", "timeouts_total")
    log = ("emitted_total", "written_total", "pending")
    gates = ("limit", "inflight", "queued", "admitted_total", "refused_wait_total", "refused_full_total")
    assert told >= {
        *(f"overdrive_cache_{name}" for name in (*cache, "push", "push_lag_seconds_bucket")),
        *(f"db_client_connection_{name}" for name in pool),
        *(f"overdrive_log_{name}" for name in log),
        *(f"overdrive_admission_{name}" for name in gates),
        "overdrive_pages_total",
    }


async def test_what_is_counted_while_it_is_read_disturbs_nobody(sqlite_url: str) -> None:
    """OpenTelemetry reads in a thread of its own."""
    async with serving(sqlite_url) as service:
        await service.http.get("/names/1")
        (trust,) = service.overdrive.cache.ledger.routes.values()
        trust.bypassed |= {"off": 1, "wrote": 1}
        names = []
        for reading in of_cache(service.overdrive.cache):
            names.append(reading.name)
            if reading.name == "overdrive.cache.bypassed":
                trust.bypassed["status"] += 1
        assert names.count("overdrive.cache.bypassed") == 2


async def test_alone_nobody_is_heard_of(sqlite_url: str) -> None:
    async with serving(sqlite_url) as service:
        assert modes(await scrape(service.http)) == {}


def modes(numbers: Numbers) -> dict[str, float]:
    return {dict(labels)["mode"]: value for (name, labels), value in numbers.items() if name == "overdrive_cache_push"}


def heard(store: Any) -> tuple[str, int]:
    """How writes are heard of, and how many have been."""
    mode, lag = store.push()
    return mode, sum(lag.counts)


# Places


def counting(numbers: list[float]) -> Exporter:
    return Exporter(
        lambda: [Reading("overdrive.pages", {"style": "page"}, numbers[0]), Reading("overdrive.log.pending", {}, 1)]
    )


def read(exporter: Exporter) -> dict[str, float]:
    registry = exporter.collected()
    names = ("overdrive_pages_total", "overdrive_log_pending")
    return {name: sum(s.value for f in registry.collect() for s in f.samples if s.name == name) for name in names}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "shared"))
    return tmp_path / "shared"


_DYING = """
import os
from overdrive.metrics import Exporter, Reading
exporter = Exporter(lambda: [Reading("overdrive.pages", {"style": "page"}, 5), Reading("overdrive.log.pending", {}, 1)])
exporter.write()
os._exit(9)
"""


def test_who_follows_one_that_died_counts_on(shared: Path) -> None:
    own = counting([2])
    assert read(own) == {"overdrive_pages_total": 2, "overdrive_log_pending": 1}
    for died in (1, 2):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", _DYING], env=environment, check=False)
        assert read(own) == {"overdrive_pages_total": 2 + died * 5, "overdrive_log_pending": 1}
        assert len(list(shared.glob("*.lock"))) == 2
    own.close()
    # Whoever has said where is to clean up.
    assert shared.exists()


def test_numbers_of_a_place_are_not_added_twice(shared: Path) -> None:
    numbers = [2.0]
    own = counting(numbers)
    for numbers[0] in (2, 3, 7):
        assert read(own)["overdrive_pages_total"] == numbers[0]
    own.close()
    # It is as if another had come.
    numbers[0] = 1
    assert read(own)["overdrive_pages_total"] == 8
    own.close()


def test_without_prometheus_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'overdrive\[metrics\]'"):
        Overdrive(FastAPI(), database_url=sqlite_url).metrics_router()
