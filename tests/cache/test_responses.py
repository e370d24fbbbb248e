"""Responses of kinds that are not kept, or not as they are; and lives of any length."""

from __future__ import annotations

import asyncio
import math
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cache.service import Service, serve
from fastapi import Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from support import call, eventually

from overdrive import ConfigurationError, Settings, cached
from overdrive.cache.entry import FORMAT, Entry, Form
from overdrive.cache.store import MemoryStore

pytestmark = pytest.mark.anyio


async def parts(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


# Kept as it is, or not at all


@pytest.mark.parametrize("length", ["10", "3"])
async def test_a_body_of_another_length_than_said_is_not_kept(service: Service, length: str) -> None:
    @service.app.get("/broken")
    @cached
    async def broken() -> Response:
        service.ran.append("/broken")
        return StreamingResponse(parts(b"abc", b"de"), headers={"content-length": length})

    for _ in range(2):
        await call(service.app, "/broken")
    assert len(service.ran) == 2


async def test_a_body_that_comes_in_parts_is_kept_where_its_length_is_said(service: Service) -> None:
    @service.app.get("/whole")
    @cached
    async def whole() -> Response:
        return StreamingResponse(parts(b"abc", b"de"), headers={"content-length": "5"})

    # Starlette cancels what streams as soon as its client has all of it.
    assert await service.marks("/whole", "/whole") == ["miss", "hit"]


async def test_what_streams_is_made_once_for_all_who_ask(service: Service) -> None:
    opened = asyncio.Event()

    @service.app.get("/stream")
    @cached
    async def stream() -> Response:
        service.ran.append("/stream")
        await opened.wait()
        return StreamingResponse(parts(b"abc", b"de"), headers={"content-length": "5"})

    asking = [asyncio.create_task(service.get("/stream")) for _ in range(5)]
    await eventually(lambda: service.ran == ["/stream"])
    opened.set()
    assert {answer.text for answer in await asyncio.gather(*asking)} == {"abcde"}
    assert service.ran == ["/stream"]


async def test_a_file_that_the_server_reads_is_not_kept(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")

    @service.app.get("/file")
    @cached
    async def file() -> Response:
        return FileResponse(path)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/file",
        "raw_path": b"/file",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": None,
        "server": None,
        "extensions": {"http.response.pathsend": {}},
    }
    for _ in range(2):
        await service.app(scope, asyncio.Event().wait, send)
    starts = [dict(message["headers"]) for message in sent if message["type"] == "http.response.start"]
    assert {start[b"cache-status"] for start in starts} == {b"overdrive; fwd=bypass; detail=file"}
    assert [message["type"] for message in sent].count("http.response.pathsend") == 2


async def test_what_belongs_to_one_connection_is_not_kept(service: Service) -> None:
    @service.app.get("/one")
    @cached
    async def one(response: Response) -> int:
        response.headers.update({"connection": "close, x-hop", "x-hop": "1", "age": "7", "x-end": "2"})
        return 1

    await service.get("/one")
    hit = await service.get("/one")
    assert hit.headers["x-cache"] == "hit"
    assert not {"connection", "x-hop"} & hit.headers.keys()
    assert (hit.headers["x-end"], hit.headers.get_list("age")) == ("2", ["0"])


async def test_what_is_not_to_be_transformed_is_not(service: Service) -> None:
    @service.app.get("/as-it-is")
    @cached
    async def as_it_is(response: Response) -> str:
        response.headers["cache-control"] = "No-Transform"
        return "x" * 5_000

    await service.get("/as-it-is")
    hit = await service.get("/as-it-is")
    assert (hit.headers["x-cache"], hit.headers.get("content-encoding")) == ("hit", None)


async def test_nobody_waits_for_the_task_behind_anothers_response(service: Service) -> None:
    ended = asyncio.Event()

    @service.app.get("/task")
    @cached
    async def task() -> Response:
        service.ran.append("/task")
        return PlainTextResponse("begun", background=BackgroundTask(ended.wait))

    asking = [asyncio.create_task(service.get("/task")) for _ in range(5)]
    await eventually(lambda: len(service.ran) == 5)
    ended.set()
    assert {answer.text for answer in await asyncio.gather(*asking)} == {"begun"}


# For how long


@pytest.mark.parametrize("ttl", [1e18, 1e300])
async def test_a_life_of_any_length(service: Service, ttl: float) -> None:
    @service.app.get("/long")
    @cached(ttl=ttl)
    async def long() -> int:
        return 1

    assert await service.marks("/long", "/long", "/names") == ["miss", "hit", "miss"]


@pytest.mark.parametrize("ttl", [0, -1, math.inf, math.nan, True, "60"], ids=str)
async def test_what_is_no_life_of_a_value_is_refused(sqlite_url: str, ttl: Any) -> None:
    async def load() -> int:
        return 1

    async with serve(sqlite_url) as service:
        cache = service.overdrive.cache
        for attempt in (lambda: cache.get_or_set("key", load, ttl=ttl), lambda: cache.memoize(ttl=ttl)):
            with pytest.raises(ConfigurationError, match="ttl= takes a positive number of seconds"):
                await attempt()  # type: ignore[misc]


def test_a_life_has_an_end() -> None:
    with pytest.raises(ConfigurationError, match="OVERDRIVE_CACHE__TTL: Input should be a finite number"):
        Settings.load(cache={"ttl": math.inf})


# How much


@pytest.mark.parametrize("tags", [1, 200])
@pytest.mark.parametrize("headers", [5, 40])
@pytest.mark.parametrize("gzip", [False, True])
async def test_entries_take_what_is_counted(tags: int, headers: int, gzip: bool) -> None:
    store = MemoryStore(1 << 30)

    def made(number: int) -> Entry:
        pairs = [(b"x-header-%d" % each, b"value-%d" % number) for each in range(headers)]
        form = Form(pairs, b"y" * 500) if gzip else None
        versions = {f"default/items#{number * tags + each:04x}": number for each in range(tags)}
        entry = Entry(FORMAT, "fingerprint", "epoch", versions, 1.5, 60.0, 200, pairs, b"x" * 2_000, form)
        # As it comes from Redis: nothing is shared with another.
        return msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=Entry)

    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(100):
            await store.save(f"{number:032x}", made(number), 60)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 < store.statistics()["memory"] / taken < 1.3
