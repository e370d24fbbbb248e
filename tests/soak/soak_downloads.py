"""A thousand clients that read slowly: none has one of five connections, and the others are served as before."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from fastapi import FastAPI, Response
from pool.storm import pool_of
from sqlalchemy import text
from support import eventually, on_uvicorn

from overdrive import Overdrive, SessionDep, Settings

pytestmark = pytest.mark.anyio

DOWNLOADS, SIZE = 1000, 1 << 20


async def fast(address: tuple[str, int], requests: int) -> list[float]:
    """Return how many seconds each request took that asks the database, one after the other."""
    reader, writer = await asyncio.open_connection(*address)
    took = []
    for _ in range(requests):
        began = time.perf_counter()
        writer.write(b"GET /fast HTTP/1.1\r\nhost: test\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(1)
        took.append(time.perf_counter() - began)
        assert head.startswith(b"HTTP/1.1 200")
    writer.close()
    return sorted(took)


async def slow(address: tuple[str, int]) -> socket.socket:
    """Ask for a download, and read no more of it than its beginning."""
    loop, end = asyncio.get_running_loop(), socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    end.setblocking(False)
    await loop.sock_connect(end, address)
    await loop.sock_sendall(end, b"GET /slow HTTP/1.1\r\nhost: test\r\n\r\n")
    assert (await loop.sock_recv(end, 12)).endswith(b"200")
    return end


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_slow_downloads_hold_no_connection(
    postgres_url: str, driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app, body = FastAPI(), b"x" * SIZE
    url = postgres_url.replace("asyncpg", driver)
    overdrive = Overdrive(app, settings=Settings(database_url=url, pool={"size": 5, "max_overflow": 0}))  # type: ignore[arg-type]
    pool = pool_of(overdrive.engine)

    @app.get("/slow")
    async def download(db: SessionDep) -> Response:
        await db.execute(text("SELECT 1"))
        return Response(body)

    @app.get("/fast")
    async def one(db: SessionDep) -> int:
        return int(await db.scalar(text("SELECT 1")) or 0)

    with on_uvicorn(app) as address:
        await fast(address, 200)
        before = await fast(address, 1000)
        ends = []
        for _ in range(DOWNLOADS // 20):
            ends += await asyncio.gather(*(slow(address) for _ in range(20)))
        await eventually(lambda: pool.checkedout() == 0)
        during = await fast(address, 1000)
        assert pool.statistics.max == 5
        for end in ends:
            end.close()
        after = await fast(address, 1000)
    with capsys.disabled():
        print(f"\n{driver}: p50, p99 in ms with {len(ends)} downloads and, before and after, without")
        for took in (during, before, after):
            print(f"    {took[500] * 1000:.2f}, {took[990] * 1000:.2f}")
    await overdrive.aclose()
