"""A service of several workers: each a process with uvicorn on a socket of its own, all on one Redis.

Run as a module it is one of these workers; what it does is told by Redis, as the workers see nothing else of a test.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from support import eventually

from overdrive import Overdrive, cached
from overdrive.cache import flight

#: Redis' keys: who has run the endpoint, and whether it may answer.
RAN, OPEN = "fleet:ran", "fleet:open"


Answers = list[tuple[int, bytes]]


@dataclass
class Fleet:
    """Four workers, and what is known of them."""

    server: Redis
    processes: list[subprocess.Popen[bytes]]
    ports: list[int]

    def ran(self) -> list[int]:
        """The process ids of the workers whose endpoint has run, in order."""
        return [int(pid) for pid in self.server.lrange(RAN, 0, -1)]

    def worker(self, pid: int) -> int:
        """The number of the worker with this process id."""
        return [process.pid for process in self.processes].index(pid)

    def open(self) -> None:
        """Let the endpoint answer."""
        self.server.set(OPEN, 1)

    async def crowd(self, number: int) -> list[asyncio.Future[Answers]]:
        """Send a number of requests to each worker, and return when all are taken and one of them is executed."""
        answers = [asyncio.gather(*(ask(port, "/value") for _ in range(number))) for port in self.ports]
        for port in self.ports:
            while await busy(port) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await eventually(lambda: bool(self.ran()), 60)
        return answers


async def ask(port: int, path: str) -> tuple[int, bytes]:
    """Send a request; return status and body of the answer, or 0 where the connection ends without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET %s HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n" % path.encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except ConnectionError:
        head = body = b""
    finally:
        writer.close()
    return (int(head.split(None, 2)[1]), body) if head else (0, b"")


async def busy(port: int) -> int:
    """How many requests a worker has taken and not answered."""
    return int((await ask(port, "/busy"))[1])


@contextmanager
def serving(redis_url: str, directory: Path, workers: int = 4) -> Iterator[Fleet]:
    """Start workers, and wait until they answer."""
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=4096) for _ in range(workers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cache.fleet", str(listener.fileno()), redis_url, directory / "fleet.sqlite"],
            pass_fds=[listener.fileno()],
            env=environment,
        )
        for listener in listeners
    ]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    try:
        for port in ports:
            _wait_until_it_answers(port)
        with Redis.from_url(redis_url) as server:
            yield Fleet(server, processes, ports)
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _wait_until_it_answers(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        # It connects to Redis with its first look-up, which is not what is tested.
        connection.sendall(b"GET /first HTTP/1.1\r\nHost: fleet\r\n\r\n")
        assert connection.recv(1000)


def application(redis_url: str, database: str) -> Any:
    app = FastAPI()
    Overdrive(app, database_url=f"sqlite+aiosqlite:///{database}", redis_url=redis_url, cache=True)
    server = AsyncRedis.from_url(redis_url)
    taken = 0

    @app.get("/first")
    @cached
    async def first() -> None:
        pass

    @app.get("/value")
    @cached
    async def value() -> int:
        await server.rpush(RAN, os.getpid())
        while not await server.exists(OPEN):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return 7

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        if scope.get("path") == "/busy":
            body = b"%d" % taken
            headers = [(b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        taken += 1
        try:
            await app(scope, receive, send)
        finally:
            taken -= 1

    return counting


def main(listener: str, redis_url: str, database: str) -> None:
    # The endpoint is held until all requests are there.
    flight._PATIENCE = 120.0
    config = uvicorn.Config(application(redis_url, database), fd=int(listener), log_level="error", backlog=4096)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
