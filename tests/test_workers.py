"""Several workers of one server, without Redis: no stale read, and metrics of all of them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from workers import Workers, serving


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    directory = tmp_path_factory.mktemp("four")
    with serving(f"sqlite+aiosqlite:///{directory / 'test.sqlite'}", directory, 4) as workers:
        yield workers


def scraped(http: httpx2.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def total(http: httpx2.Client, name: str) -> float:
    return sum(value for (each, _), value in scraped(http).items() if each == name)


def asked(http: httpx2.Client) -> float:
    """How many requests the cache has seen."""
    names = ("hits", "misses", "bypassed")
    return sum(total(http, f"overdrive_cache_{name}_total") for name in names)


def until_all_is_told(http: httpx2.Client, workers: Workers) -> None:
    """Wait until all workers have written down what they have counted."""
    deadline = time.monotonic() + 20
    while asked(http) < workers.sent and time.monotonic() < deadline:
        time.sleep(0.1)
    assert asked(http) == workers.sent


def test_no_answered_write_is_followed_by_a_stale_read(four: Workers) -> None:
    workers = list(four.by_pid.values())
    for name, writer in zip(range(40), itertools.cycle(workers)):
        assert writer.put("/items/1", params={"name": name}).status_code == 200
        answers = [four.read(reader) for reader in workers for _ in range(2)]
        assert {answer.json() for answer in answers} == {str(name)}
        assert {answer.headers["x-cache"] for answer in answers} == {"miss"}


def test_whoever_is_scraped_tells_of_all(four: Workers) -> None:
    workers = list(four.by_pid.values())
    for worker in workers:
        worker.get("/items")
        for _ in range(5):
            four.read(worker)
    for worker in workers:
        until_all_is_told(worker, four)
        assert total(worker, "overdrive_pages_total") == 4


def test_what_a_dead_worker_has_counted_is_not_lost(four: Workers) -> None:
    (dying, victim), (_, other) = list(four.by_pid.items())[:2]
    for _ in range(5):
        four.read(victim)
    until_all_is_told(other, four)
    os.kill(dying, signal.SIGKILL)
    for _ in range(5):
        four.read(other)
        until_all_is_told(other, four)


def test_one_worker_keeps_and_counts(tmp_path: Path) -> None:
    with serving(f"sqlite+aiosqlite:///{tmp_path / 'test.sqlite'}", tmp_path, 1) as one:
        http = next(iter(one.by_pid.values()))
        marks = [one.read(http).headers["x-cache"] for _ in range(50)]
        assert marks == ["miss", *["hit"] * 49]
        assert asked(http) == 50
        assert len(list(tmp_path.glob("overdrive-*"))) == 2
    assert not list(tmp_path.glob("overdrive-*"))
