"""One context and one event a request, whatever becomes of it; on a socket too."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, WebSocket
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.testclient import TestClient
from support import call, client, recorded

from overdrive import LogHandler, Overdrive, Settings, bind
from overdrive.context import current
from overdrive.instrumentation.events import RequestEvent

pytestmark = pytest.mark.anyio

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def served(url: str, **options: Any) -> FastAPI:
    app, router, mounted = FastAPI(), APIRouter(), FastAPI()
    Overdrive(app, settings=Settings(database_url=url, **options))

    @router.get("/ok/{number}")
    async def ok(number: int) -> str:
        bind(number=number)
        return "x" * number

    mounted.include_router(router)
    app.include_router(router)
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")
    app.mount("/mounted", mounted)

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(418)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"chunk"

        return StreamingResponse(chunks())

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"chunk"
                await asyncio.sleep(0.01)

        return StreamingResponse(chunks())

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(Path(__file__))

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(30)

    @app.websocket("/ws/{room}")
    async def talk(socket: WebSocket, room: str) -> None:
        await socket.accept()
        await socket.send_text(room)
        await socket.close()

    return app


def requests(events: list[Any]) -> list[RequestEvent]:
    return [event for event in events if isinstance(event, RequestEvent)]


OUTCOMES = {
    "/ok/3": (200, "ok", "/ok/{number}", 5),
    "/v1/ok/3": (200, "ok", "/v1/ok/{number}", 5),
    "/v2/ok/3": (200, "ok", "/v2/ok/{number}", 5),
    "/mounted/ok/3": (200, "ok", "/mounted/ok/{number}", 5),
    "/ok/x": (422, "ok", "/ok/{number}", None),
    "/nowhere": (404, "ok", None, 22),
    "/refused": (418, "ok", "/refused", None),
    "/broken": (500, "error", "/broken", 21),
    "/stream": (200, "ok", "/stream", 15),
    "/file": (200, "ok", "/file", len(Path(__file__).read_bytes())),
}


@pytest.mark.parametrize("path", OUTCOMES)
async def test_every_answer_has_an_id_and_one_event(sqlite_url: str, path: str) -> None:
    status, outcome, route, size = OUTCOMES[path]
    with recorded() as events:
        answer = await call(served(sqlite_url), path)
    [event] = requests(events)
    assert (event.status, event.outcome, event.route) == (status, outcome, route) == (answer.status, outcome, route)
    assert event.bytes_sent == len(answer.body) == (size if size is not None else len(answer.body))
    assert (event.method, event.path) == ("GET", path)
    assert event.duration > 0
    assert answer.headers["x-request-id"] == event.request_id


async def test_cancelled_request_has_its_event(sqlite_url: str) -> None:
    with recorded() as events:
        task = asyncio.create_task(call(served(sqlite_url), "/slow"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [(event.status, event.outcome) for event in requests(events)] == [(None, "cancelled")]


def test_websocket_has_its_event(sqlite_url: str) -> None:
    with recorded() as events, TestClient(served(sqlite_url)) as http, http.websocket_connect("/ws/blue") as socket:
        assert socket.receive_text() == "blue"
    [event] = requests(events)
    assert (event.method, event.path, event.route, event.outcome) == ("WEBSOCKET", "/ws/blue", "/ws/{room}", "ok")


async def test_concurrent_requests_do_not_mix(sqlite_url: str) -> None:
    app = served(sqlite_url)
    with recorded() as events:
        await asyncio.gather(*(call(app, f"/ok/{number}") for number in range(1, 30)))
    assert len({event.request_id for event in requests(events)}) == 29
    assert all(event.fields == {"number": event.bytes_sent - 2} for event in requests(events))
    assert current() is None


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", (TRACE, SPAN)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", (TRACE, SPAN)),
        (f"00-{'0' * 32}-{SPAN}-01", (None, None)),
        (f"00-{TRACE}-{'0' * 16}-01", (None, None)),
        (f"00-{TRACE.upper()}-{SPAN}-01", (None, None)),
        (f"ff-{TRACE}-{SPAN}-01", (None, None)),
        ("nonsense", (None, None)),
    ],
)
async def test_trace_context(sqlite_url: str, traceparent: str, expected: tuple[Any, Any]) -> None:
    with recorded() as events:
        async with client(served(sqlite_url)) as http:
            await http.get("/ok/1", headers={"traceparent": traceparent})
    assert [(event.trace_id, event.span_id) for event in requests(events)] == [expected]


@pytest.mark.parametrize("wanted", [True, False])
async def test_event_is_logged_once_if_wanted(sqlite_url: str, caplog: pytest.LogCaptureFixture, wanted: bool) -> None:
    caplog.set_level(logging.INFO, "overdrive.request")
    await call(served(sqlite_url, log={"events": wanted}), "/ok/1")
    logged = [record.getMessage() for record in caplog.records if record.name == "overdrive.request"]
    assert len(logged) == wanted
    assert all(message.startswith("GET /ok/1 200 ") for message in logged)


async def test_id_header_has_the_name_of_the_settings(sqlite_url: str) -> None:
    answer = await call(served(sqlite_url, log={"request_id_header": "x-trace"}), "/ok/1")
    assert len(answer.headers["x-trace"]) == 16


# On a socket


@contextmanager
def on_uvicorn(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_on_a_socket_every_line_carries_the_id_of_its_response(sqlite_url: str, tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log", level=logging.INFO)
    logging.root.addHandler(handler)
    level = logging.root.level
    logging.root.setLevel(logging.INFO)
    try:
        with on_uvicorn(served(sqlite_url)) as address, httpx2.Client(base_url=address) as http:
            # uvicorn cuts the connection of a request that raised: the next one must not meet it half closed.
            ok, broken = http.get("/ok/5"), http.get("/broken", headers={"connection": "close"})
            with http.stream("GET", "/endless") as endless:
                next(endless.iter_bytes())
            time.sleep(0.3)
        handler.flush()
    finally:
        logging.root.removeHandler(handler)
        logging.root.setLevel(level)
        handler.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    def of(response: httpx2.Response, logger: str) -> list[dict[str, Any]]:
        request_id = response.headers["x-request-id"]
        return [line for line in lines if line.get("request_id") == request_id and line["logger"] == logger]

    assert [(line["status"], line["number"]) for line in of(ok, "overdrive.request")] == [(200, 5)]
    assert [line["outcome"] for line in of(broken, "overdrive.request")] == ["error"]
    [told] = of(broken, "uvicorn.error")
    assert told["exception"]["type"].endswith("RuntimeError")
    assert [line["outcome"] for line in of(endless, "overdrive.request")] == ["disconnected"]
    # What the server says after the app has shut down is written too.
    assert lines[-1]["message"].startswith("Finished server process")
