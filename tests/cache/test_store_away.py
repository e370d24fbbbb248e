"""Redis away: requests are slower, never wrong, and nobody restarts anything. Promise 9."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from anyio import sleep
from cache.service import Service, serve
from redis import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, call

from overdrive import SessionDep, cached
from overdrive.cache.store import StoreUnavailable
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

AWAY = "overdrive; fwd=bypass; detail=store-unavailable"

Start = Callable[[], AbstractContextManager[str]]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def start(port: int, server_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a Redis that is at the same address each time, and empty."""
    monkeypatch.setattr(servers, "_free_port", lambda: port)
    return lambda: servers.redis(server_directory)


@pytest.fixture
def running(start: Start) -> Iterator[str]:
    with start() as url:
        yield url


@pytest.fixture
async def service(sqlite_url: str, port: int) -> AsyncIterator[Service]:
    async with serve(sqlite_url, f"redis://127.0.0.1:{port}/0") as running:
        yield running


async def add(db: AsyncSession) -> None:
    db.add(Item(name="new"))


async def healed(service: Service, path: str = "/names") -> list[Any]:
    """Ask until the cache is in use again; returned are the bodies."""
    bodies = []
    for _ in range(200):
        answer = await service.get(path)
        assert answer.status_code == 200
        bodies.append(answer.json())
        if answer.headers["x-cache"] == "hit":
            return bodies
        await sleep(0.02)
    raise AssertionError(f"not healed: {answer.headers['cache-status']}")


async def test_nothing_listens(service: Service) -> None:
    for _ in range(2):
        answer = await service.get()
        assert (answer.status_code, answer.json()) == (200, ["first"])
        assert answer.headers["cache-status"] == AWAY
        assert answer.headers["x-cache"] == "bypass"
    assert await service.write(add) == 200
    assert (await service.get()).json() == ["first", "new"]


async def test_a_server_that_never_answers_is_not_waited_for_again(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.cache._REST", 600.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with serve(sqlite_url, f"redis://127.0.0.1:{mute.getsockname()[1]}/0") as service:
            assert [(await service.get()).headers["cache-status"] for _ in range(3)] == [AWAY] * 3
            mute.settimeout(0)
            # The first request has connected, and tried a second time; the others have left it alone.
            for _ in range(2):
                mute.accept()[0].close()
            with pytest.raises(BlockingIOError):
                mute.accept()


async def test_a_server_stops_and_returns(service: Service, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start():
        assert await service.marks("/names", "/names") == ["miss", "hit"]
    answer = await service.get()
    assert (answer.status_code, answer.json(), answer.headers["cache-status"]) == (200, ["first"], AWAY)
    assert await service.write(add) == 200
    assert "could not be told of a write" in caplog.text
    with start():
        assert all(body == ["first", "new"] for body in await healed(service))


async def test_a_server_hangs_and_goes_on(service: Service, running: str) -> None:
    with Redis.from_url(running) as redis:
        process = redis.info()["process_id"]
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    os.kill(process, signal.SIGSTOP)
    try:
        answer = await asyncio.wait_for(service.get(), 4)
        assert (answer.json(), answer.headers["cache-status"]) == (["first"], AWAY)
    finally:
        os.kill(process, signal.SIGCONT)
    assert await healed(service)


async def test_a_server_stops_while_a_request_is_answered(service: Service, start: Start) -> None:
    running = ExitStack()
    running.enter_context(start())

    @service.app.get("/stopping")
    @cached
    async def stopping(db: SessionDep) -> list[str]:
        running.close()
        return list(await db.scalars(select(Item.name)))

    answer = await call(service.app, "/stopping")
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, b'["first"]', "miss")
    # Nor is the failure to store it a failure of the request.
    assert answer.error is None
    assert (await service.get("/stopping")).headers["cache-status"] == AWAY
    with start():
        assert await healed(service, "/stopping")


async def test_a_write_that_redis_did_not_hear_of_is_never_served_over(
    service: Service, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old entry is there all the time, with every stamp as it was."""
    assert await service.marks("/names", "/names") == ["miss", "hit"]

    async def lost(_tags: Any) -> None:
        raise StoreUnavailable("lost on the way")

    with monkeypatch.context() as patch:
        patch.setattr(service.overdrive.cache.store, "bump", lost)
        assert await service.write(add) == 200
        answer = await service.get()
        assert (answer.json(), answer.headers["cache-status"]) == (["first", "new"], AWAY)
    assert all(body == ["first", "new"] for body in await healed(service))
