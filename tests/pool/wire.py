"""A wire between a pool and its database, which fails as networks do: without a word, or in the middle of one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from sqlalchemy import make_url

#: What becomes of a connection once its COMMIT is with the server.
Loss = Literal["silent", "closed"]


class _Pair:
    """A connection of the pool and the one behind it. A deaf one is open still, but nothing arrives."""

    def __init__(self, is_deaf: bool) -> None:
        self.is_deaf = is_deaf
        self.loses_answer = False


class Wire:
    """A TCP proxy.

    server: what is at its other end, for connections that are opened now.
    is_silent: whether connections that are opened now are swallowed, too.
    loses_commits: what happens between a COMMIT and its answer; None for nothing.
    commits: how many COMMITs have been seen.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server = host, port
        self._pairs: set[_Pair] = set()
        self._ends: set[asyncio.StreamWriter] = set()
        self.is_silent = False
        self.loses_commits: Loss | None = None
        self.commits = 0

    def silence(self) -> None:
        """Swallow whatever is sent from now on, on connections that are open and on new ones."""
        self.is_silent = True
        self.forget()

    def forget(self) -> None:
        """Swallow what is sent on connections that are open, as a firewall does that has lost its table."""
        for pair in list(self._pairs):
            pair.is_deaf = True

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(self.is_silent)
        self._pairs.add(pair)
        server_reader, server_writer = await asyncio.open_connection(*self.server)
        ends = {writer, server_writer}
        self._ends |= ends
        await asyncio.gather(
            self._pump(reader, server_writer, pair, is_client=True),
            self._pump(server_reader, writer, pair, is_client=False),
        )
        self._pairs.discard(pair)
        self._ends -= ends
        for each in ends:
            each.close()

    async def cut(self) -> None:
        """End all connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for each in self._ends:
            each.transport.abort()
        await asyncio.gather(*others)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, pair: _Pair, *, is_client: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                if is_client and b"COMMIT" in data:
                    self.commits += 1
                    pair.loses_answer = self.loses_commits is not None
                if pair.is_deaf:
                    continue
                if pair.loses_answer and not is_client:
                    pair.is_deaf = self.loses_commits == "silent"
                    if not pair.is_deaf:
                        break
                    continue
                sink.write(data)
                await sink.drain()
        # Nobody hears that the other one has left, either.
        if not pair.is_deaf:
            sink.close()


@contextmanager
def wire(url: str) -> Iterator[tuple[Wire, str]]:
    """Yield a wire, and the URL of the database at its other end."""
    target = make_url(url)
    assert target.host is not None
    assert target.port is not None
    between = Wire(target.host, target.port)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(between.accept, "127.0.0.1", 0), loop).result()
    try:
        yield between, target.set(port=server.sockets[0].getsockname()[1]).render_as_string(hide_password=False)
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(between.cut(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
