"""The load generators against servers that do what no good server does."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from benchmarks.load import ClosedLoop, LoadError, run_open

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def listening(handle: Handle) -> Iterator[int]:
    """Serve connections in a thread until the clients have closed them; yield the port."""
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    loop, done = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        handling: list[asyncio.Task[None]] = []
        writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            handling.append(asyncio.current_task())  # type: ignore[arg-type]
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await handle(reader, writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await done.wait()
        await asyncio.gather(*handling)
        for writer in writers:
            writer.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        yield ports.get(timeout=10)
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


def answering(*answers: bytes) -> Handle:
    """Answer a connection's requests in turn, then as the last time; an empty answer hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(answers)
        while await reader.readuntil(b"\r\n\r\n"):
            answer = left.pop(0) if len(left) > 1 else left[0]
            if not answer:
                writer.close()
                return
            writer.write(answer)

    return handle


def test_closed_loop_counts_every_request() -> None:
    with listening(answering(OK)) as port:
        load = ClosedLoop(port, "/", connections=3)
        assert [len(load.run(requests)) for requests in (3, 50, 7)] == [3, 50, 7]
        assert all(latency > 0 for latency in load.run(10))
        load.close()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", b"", OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")],
)
def test_closed_loop_breaks_with_the_server(answer: bytes) -> None:
    with listening(answering(OK, OK, answer)) as port:
        load = ClosedLoop(port, "/", connections=2)
        with pytest.raises(LoadError):
            load.run(100)
        load.close()


def test_open_loop_asks_on_while_the_server_is_silent_and_counts_from_when_a_request_was_due() -> None:
    due = [number / 100 for number in range(30)]
    waiting: list[asyncio.StreamWriter] = []

    async def answer_all_once_all_have_asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        waiting.append(writer)
        if len(waiting) == len(due):
            for each in waiting:
                each.write(OK)

    with listening(answer_all_once_all_have_asked) as port:
        [answers] = run_open(port, ["/"], [due], deadline=30)
    assert [answer.status for answer in answers] == [200] * len(due)
    # All were answered at one time, so the first has waited longer than the last by all of the schedule.
    assert answers[0].latency - answers[-1].latency > 0.9 * due[-1]


def test_client_of_the_open_loop_gives_up_at_its_deadline_and_hangs_up() -> None:
    hung_up: list[bool] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            await reader.read()
        finally:
            hung_up.append(True)

    with listening(silent) as port:
        [answers] = run_open(port, ["/"], [[0.0, 0.01]], deadline=0.2)
    assert [answer.status for answer in answers] == [None, None]
    assert hung_up == [True, True]


def test_open_loop_takes_refusals_and_dead_connections_as_answers() -> None:
    no = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    with listening(answering(no, b"")) as port:
        [first, second] = run_open(port, ["/"], [[0.0], [0.1, 0.2]], deadline=5)
    assert [answer.status for answer in (*first, *second)] == [503, None, 503]
