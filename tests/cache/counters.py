"""A service of several workers whose rows only ever grow, and what befalls it: then a smaller number is an older one.

Run as a module it is one of these workers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import Overdrive, SessionDep, SyncSessionDep, cached
from overdrive.demo import servers


class Base(DeclarativeBase):
    pass


class Counter(Base):
    __tablename__ = "counters"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


def application(redis_url: str, database_url: str) -> FastAPI:
    app = FastAPI()
    Overdrive(app, database_url=database_url, redis_url=redis_url, cache=True)

    @app.get("/one/{i}")
    @cached(ttl=3600)
    async def one(i: int, db: SessionDep) -> dict[int, int]:
        counter = await db.get_one(Counter, i)
        return {counter.id: counter.n}

    @app.get("/all")
    @cached(ttl=3600)
    async def every(db: SessionDep) -> dict[int, int]:
        return {counter.id: counter.n for counter in await db.scalars(select(Counter))}

    @app.get("/sync/{i}")
    @cached(ttl=3600)
    def one_sync(i: int, db: SyncSessionDep) -> dict[int, int]:
        return {i: db.scalars(select(Counter.n).where(Counter.id == i)).one()}

    @app.post("/unit/{i}/{n}")
    async def unit(i: int, n: int, db: SessionDep) -> None:
        counter = await db.get_one(Counter, i, with_for_update=True)
        counter.n = max(counter.n, n)

    @app.post("/core/{i}/{n}")
    async def core(i: int, n: int, db: SessionDep) -> None:
        await db.execute(update(Counter).where(Counter.id == i).values(n=func.greatest(Counter.n, n)))

    @app.post("/text/{i}/{n}")
    async def textual(i: int, n: int, db: SessionDep) -> None:
        await db.execute(text("UPDATE counters SET n = greatest(n, :n) WHERE id = :i"), {"i": i, "n": n})

    @app.post("/sync/{i}/{n}")
    def sync(i: int, n: int, db: SyncSessionDep) -> None:
        db.execute(update(Counter).where(Counter.id == i).values(n=func.greatest(Counter.n, n)))

    return app


READS = ("one", "all", "sync")
WRITES = ("unit", "core", "text", "sync")


class Ledger:
    """What was written, and how old what is read may be.

    lag: seconds after its answer from which a write is to be seen by other workers.
    """

    def __init__(self, lag: float) -> None:
        self._lag = lag
        #: By row and by worker: when each write was answered, and what it wrote.
        self._written: dict[tuple[int, int | None], tuple[list[float], list[int]]] = {}

    def wrote(self, worker: int, row: int, n: int) -> None:
        """Note that a write was answered just now."""
        for who in (worker, None):
            times, numbers = self._written.setdefault((row, who), ([], []))
            times.append(time.monotonic())
            numbers.append(max([n, *numbers[-1:]]))

    def least(self, worker: int, row: int, asked: float) -> int:
        """What may be read at least by who has asked this worker then."""
        return max(self._at(row, worker, asked), self._at(row, None, asked - self._lag))

    def _at(self, row: int, who: int | None, moment: float) -> int:
        times, numbers = self._written.get((row, who), ([], []))
        place = bisect_right(times, moment)
        return numbers[place - 1] if place else 0


Mode = Literal["open", "stalled", "closed", "deaf", "mute"]


class Proxy:
    """Stands between one worker and Redis.

    mode: what is passed on: everything (open), nothing (stalled), nothing from the worker (mute) or to it (deaf);
        closed means that there is nobody to connect to.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = asyncio.Event()
        self._mode: Mode = "open"
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def switch(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "closed":
            for writer in self._writers:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "closed":
            writer.close()
            return
        with suppress(OSError, asyncio.CancelledError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers |= {writer, up_writer}
            pumps = self._pump(reader, up_writer, "mute"), self._pump(up_reader, writer, "deaf")
            await asyncio.gather(*pumps, return_exceptions=True)
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, held: Mode) -> None:
        try:
            while data := await reader.read(65536):
                while self._mode in ("stalled", held):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def aclose(self) -> None:
        self.switch("closed")
        self._server.close()


@dataclass
class RedisServer:
    """A Redis that can be stopped, killed, and started again with what it has saved."""

    directory: Path
    port: int = 0

    def start(self) -> None:
        self.port = self.port or free_port()
        binary = servers.redis_binary()
        command = [binary, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.directory), "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = Redis(port=self.port, retry=None)
        while True:
            with suppress(RedisError):
                self.client.ping()
                return
            time.sleep(0.01)

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Worker:
    """A process with uvicorn on a socket of its own."""

    def __init__(self, redis_url: str, database_url: str) -> None:
        self._arguments = redis_url, database_url
        self.port = free_port()
        #: Another process is another worker, which may have heard less.
        self.number = 0
        self.start()

    def start(self) -> None:
        self.number += 1
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "cache.counters", str(self.port), *self._arguments]
        self.process = subprocess.Popen(command, env=environment)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    async def ready(self) -> None:
        """Wait until it serves, and has come to Redis: of one that never has nobody could know."""
        while True:
            with suppress(OSError):
                await ask(self.port, "GET", "/all")
                return
            await asyncio.sleep(0.05)


async def ask(port: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """Send a request on a connection of its own; raise `OSError` where there is no answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if not head:
        raise ConnectionError("closed without an answer")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if len(body) < int(headers.get("content-length", 0)):
        raise ConnectionError("closed in the middle of an answer")
    return int(status.split(None, 2)[1]), headers, body


@contextmanager
def running(urls: list[str], database_url: str) -> Iterator[list[Worker]]:
    workers = [Worker(url, database_url) for url in urls]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def main(port: str, redis_url: str, database_url: str) -> Any:
    uvicorn.run(application(redis_url, database_url), port=int(port), log_level="error")


if __name__ == "__main__":
    main(*sys.argv[1:])
