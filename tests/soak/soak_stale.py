"""No read is older than a write that was answered before it, whatever befalls the workers, Redis and the database."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter as Count
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from cache.counters import READS, WRITES, Base, Counter, Ledger, Proxy, RedisServer, Worker, ask, running
from sqlalchemy import delete, insert, text
from support import outside

pytestmark = pytest.mark.anyio

#: So many that a row is left alone for some seconds after it was written.
ROWS = range(1, 61)
#: The lease of one second, and what a busy machine takes besides.
LAG = 1.3
#: Textual SQL outdates everything.
HOW_OFTEN = (10, 10, 0.2, 10)


async def test_no_stale_read(postgres_url: str, tmp_path: Path, rounds: Iterator[int]) -> None:
    database = outside(postgres_url)
    Base.metadata.create_all(database)
    with database.begin() as connection:
        connection.execute(delete(Counter))
        connection.execute(insert(Counter), [{"id": i, "n": 0} for i in ROWS])
    redis = RedisServer(tmp_path)
    redis.start()
    proxies = [Proxy(redis.port) for _ in range(4)]
    urls = [f"redis://127.0.0.1:{await proxy.start()}/0" for proxy in proxies]
    ledger, counts = Ledger(LAG), Count[str]()
    numbers = iter(range(1, 1 << 60))

    with running(urls, postgres_url) as workers:

        async def write(rows: list[int]) -> None:
            while True:
                which, row, n = random.randrange(4), random.choice(rows), next(numbers)
                worker = workers[which]
                identity = which * 1000 + worker.number
                try:
                    status, _, _ = await ask(worker.port, "POST", f"/{random.choices(WRITES, HOW_OFTEN)[0]}/{row}/{n}")
                except OSError:
                    counts["write without an answer"] += 1
                    await asyncio.sleep(0.05)
                    continue
                counts[f"write {status}"] += 1
                if status == 200:
                    ledger.wrote(identity, row, n)
                await asyncio.sleep(random.random() * 0.5)

        async def read() -> None:
            while True:
                which, how = random.randrange(4), random.choice(READS)
                worker, row = workers[which], random.choice(ROWS)
                asked, identity = time.monotonic(), which * 1000 + worker.number
                try:
                    status, headers, body = await ask(worker.port, "GET", f"/{how}" + f"/{row}" * (how != "all"))
                except OSError:
                    counts["read without an answer"] += 1
                    await asyncio.sleep(0.05)
                    continue
                counts[f"read {status} {headers.get('x-cache')}"] += 1
                if status == 200:
                    for i, n in json.loads(body).items():
                        least = ledger.least(identity, int(i), asked)
                        said = f"worker {which} said {n} of row {i}, which was {least}"
                        assert n >= least, f"{said}: {how}, {headers['cache-status']}; {latest}"
                await asyncio.sleep(random.random() * 0.01)

        latest: list[str] = []
        for worker in workers:
            await worker.ready()
        work = [asyncio.create_task(write([row for row in ROWS if row % 3 == k])) for k in range(3)]
        work += [asyncio.create_task(read()) for _ in range(6)]
        try:
            for _ in rounds:
                fault = random.choice(FAULTS)
                latest.append(fault.__name__)
                del latest[:-3]
                await fault(workers, proxies, redis, postgres_url)
                await asyncio.sleep(random.random() * 2)
                for each in work:
                    if each.done():
                        each.result()
            # Trust comes back by itself.
            await asyncio.sleep(2)
            for worker in workers:
                marks = [(await ask(worker.port, "GET", "/one/1"))[1]["x-cache"] for _ in range(20)]
                assert "hit" in marks
        finally:
            for each in work:
                each.cancel()
            await asyncio.wait(work)
            for proxy in proxies:
                await proxy.aclose()
            redis.stop()
            database.dispose()
            print(dict(counts))
    assert counts["read 200 hit"] > counts["read 200 miss"] / 10


async def calm(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    await asyncio.sleep(1)


async def killed_worker(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    worker = random.choice(workers)
    worker.kill()
    await asyncio.sleep(random.random())
    worker.start()
    await worker.ready()


async def stopped_worker(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    worker = random.choice(workers)
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(random.random() * 3)
    worker.signal(signal.SIGCONT)


async def cut_off_worker(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    proxy = random.choice(proxies)
    proxy.switch(random.choice(["stalled", "closed", "deaf", "mute"]))
    await asyncio.sleep(random.random() * 5)
    proxy.switch("open")


async def stopped_redis(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    redis.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(random.random() * 2)
    redis.process.send_signal(signal.SIGCONT)


async def restarted_redis(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    """With what it has saved some time before: versions go back."""
    redis.client.save()
    await asyncio.sleep(random.random() * 2)
    redis.restart()


async def emptied_redis(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    redis.client.flushall()


async def evicting_redis(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    for _ in range(20):
        if key := redis.client.randomkey():
            redis.client.delete(key)  # type: ignore[arg-type]
        await asyncio.sleep(0.02)


async def killed_connections(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    redis.client.client_kill_filter(skipme=True)


async def terminated_backends(workers: list[Worker], proxies: list[Proxy], redis: RedisServer, url: str) -> None:
    """In the middle of whatever they do, COMMIT too."""
    engine = outside(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.5"
            )
        )
    engine.dispose()


FAULTS: list[Callable[[list[Worker], list[Proxy], RedisServer, str], Awaitable[None]]] = [
    calm,
    killed_worker,
    stopped_worker,
    cut_off_worker,
    cut_off_worker,
    stopped_redis,
    restarted_redis,
    emptied_redis,
    evicting_redis,
    killed_connections,
    terminated_backends,
]
