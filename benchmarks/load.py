"""Load over HTTP/1.1: closed loop for the price of a request, open loop for what becomes of a service in a storm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import cycle
from time import perf_counter
from typing import NamedTuple, cast

import httptools
import uvloop

HOST = "127.0.0.1"
#: Connections the open loop may hold; a request beyond them waits, and its latency counts that.
_MOST_CONNECTIONS = 4_000
#: Seconds that a closed loop waits for all of its answers.
_PATIENCE = 60


class LoadError(Exception):
    """A server that answered something else than 200, or hung up."""


class _Connection(asyncio.Protocol):
    """A connection that has one request under way at most; `done` hears its status, None if the server hung up."""

    def __init__(self) -> None:
        self.done: Callable[[int | None], None] | None = None
        self.open = True
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's by type.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.open = self._parser.should_keep_alive()
        self._finish(self._parser.get_status_code())

    def connection_lost(self, _error: Exception | None) -> None:
        self.open = False
        self._finish(None)

    def ask(self, request: bytes, done: Callable[[int | None], None]) -> None:
        self.done = done
        self.transport.write(request)

    def _finish(self, status: int | None) -> None:
        done, self.done = self.done, None
        if done is not None:
            done(status)


def _request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: application/json\r\n\r\n".encode()


class ClosedLoop:
    """Clients that each wait for an answer before they ask again, over connections that stay open until `close`."""

    def __init__(self, port: int, path: str, connections: int) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._request = _request(path)
        self._connections = self._runner.run(_connect(port, connections))

    def run(self, requests: int) -> list[float]:
        """Send as many requests in all; return their latencies in seconds.

        Raises `LoadError` if one of them is not answered with 200, or not all of them within a minute.
        """
        return self._runner.run(self._run(requests))

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.transport.abort()
        self._runner.close()

    async def _run(self, requests: int) -> list[float]:
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        latencies: list[float] = []
        left = requests

        def send(connection: _Connection) -> None:
            nonlocal left
            left -= 1
            sent = perf_counter()

            def done(status: int | None) -> None:
                latencies.append(perf_counter() - sent)
                if status != 200 or not connection.open:
                    finish(LoadError(f"answered {status or 'nothing'}, and hung up or was wrong"))
                elif left > 0:
                    send(connection)
                elif len(latencies) == requests:
                    finish()

            connection.ask(self._request, done)

        def finish(error: Exception | None = None) -> None:
            if finished.done():
                return
            if error is None:
                finished.set_result(None)
            else:
                finished.set_exception(error)

        for connection in self._connections:
            send(connection)
        try:
            async with asyncio.timeout(_PATIENCE):
                await finished
        except TimeoutError:
            raise LoadError(f"{len(latencies)} of {requests} requests answered in {_PATIENCE} s") from None
        return latencies


async def _connect(port: int, connections: int) -> list[_Connection]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(_Connection, HOST, port))[1] for _ in range(connections)]


class Answer(NamedTuple):
    """What became of a request: its status (None: no answer within the deadline), and since when, in seconds."""

    status: int | None
    latency: float
    #: How late it was sent because the generator itself was busy.
    lag: float


def run_open(
    port: int,
    paths: Sequence[str],
    phases: Sequence[Sequence[float]],
    deadline: float,
    begins: Callable[[], None] = lambda: None,
) -> list[list[Answer]]:
    """Send a request at each of the given instants, whatever became of those before.

    A latency runs from the instant a request was due, so that a server that stalls is not asked less often and not
    excused for what it kept waiting (coordinated omission: Gil Tene, How NOT to Measure Latency, 2013). A client
    gives up `deadline` seconds after that instant, and closes its connection.

    Parameters:
        paths: what is asked for in turn.
        phases: instants in ascending order, in seconds from the start, which is the same for all phases.
        begins: is called when a phase begins.
    """
    return uvloop.run(_OpenLoop(port, paths, deadline).run(phases, begins))


def run_side_by_side(ports: Sequence[int], path: str, instants: Sequence[float], deadline: float) -> list[list[Answer]]:
    """Send a request to each of several servers at each of the given instants, as `run_open` does to one."""

    async def run() -> list[list[Answer]]:
        loops = [_OpenLoop(port, [path], deadline) for port in ports]
        return [answers for [answers] in await asyncio.gather(*(loop.run([instants]) for loop in loops))]

    return uvloop.run(run())


class _OpenLoop:
    def __init__(self, port: int, paths: Sequence[str], deadline: float) -> None:
        self._port, self._requests, self._deadline = port, cycle(map(_request, paths)), deadline
        self._idle: list[_Connection] = []
        self._slots = asyncio.Semaphore(_MOST_CONNECTIONS)

    async def run(
        self, phases: Sequence[Sequence[float]], begins: Callable[[], None] = lambda: None
    ) -> list[list[Answer]]:
        start = perf_counter()
        tasks: list[list[asyncio.Task[Answer]]] = []
        for phase in phases:
            begins()
            tasks.append([])
            for due in phase:
                await asyncio.sleep(start + due - perf_counter())
                tasks[-1].append(asyncio.create_task(self._answer(start + due)))
        answers = [list(await asyncio.gather(*phase)) for phase in tasks]
        for connection in self._idle:
            connection.transport.abort()
        return answers

    async def _answer(self, due: float) -> Answer:
        lag = perf_counter() - due
        status = None
        try:
            async with asyncio.timeout(self._deadline - lag), self._slots:
                status = await self._ask()
        except (TimeoutError, OSError):
            pass
        return Answer(status, perf_counter() - due, lag)

    async def _ask(self) -> int | None:
        connection = await self._connection()
        answered: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        connection.ask(next(self._requests), lambda status: None if answered.done() else answered.set_result(status))
        try:
            status = await answered
        except asyncio.CancelledError:
            connection.transport.abort()
            raise
        if connection.open:
            self._idle.append(connection)
        return status

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return (await _connect(self._port, 1))[0]
