"""One context and one event a request, whatever becomes of it; on a socket too."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request, WebSocket, WebSocketException
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from support import Item, call, client, on_uvicorn, recorded, tables

from overdrive import LogHandler, Overdrive, SessionDep, Settings, add_pagination, bind
from overdrive.context import RequestContext, current
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

    @app.get("/broken-stream")
    async def broken_stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"chunk"
            raise RuntimeError("broken")

        return StreamingResponse(chunks())

    @app.get("/later")
    def later() -> PlainTextResponse:
        return PlainTextResponse("later", 503)

    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(Path(__file__))

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(30)

    @app.websocket("/ws/{room}")
    async def talk(socket: WebSocket, room: str) -> None:
        if room == "refused":
            raise WebSocketException(1008)
        if room == "denied":
            await socket.send_denial_response(PlainTextResponse("no", 403))
            return
        await socket.accept()
        if room == "broken":
            raise RuntimeError("broken")
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
    "/broken-stream": (200, "error", "/broken-stream", 5),
    "/later": (503, "error", "/later", 5),
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


@pytest.mark.parametrize(("room", "outcome"), [("refused", "ok"), ("broken", "error")])
def test_websocket_that_ends_badly_has_its_event(sqlite_url: str, room: str, outcome: str) -> None:
    with (
        recorded() as events,
        TestClient(served(sqlite_url)) as http,
        pytest.raises((RuntimeError, WebSocketDisconnect)),
        http.websocket_connect(f"/ws/{room}") as socket,
    ):
        socket.receive_text()
    assert [(event.route, event.status, event.outcome) for event in requests(events)] == [("/ws/{room}", None, outcome)]


def test_websocket_denied_with_a_response_has_its_status_and_an_id(sqlite_url: str) -> None:
    with (
        recorded() as events,
        TestClient(served(sqlite_url)) as http,
        pytest.raises(WebSocketDenialResponse) as denied,
        http.websocket_connect("/ws/denied"),
    ):
        pass
    [event] = requests(events)
    assert (event.status, event.outcome, event.bytes_sent) == (403, "ok", 2)
    assert denied.value.headers["x-request-id"] == event.request_id


def scope_of(path: str, *, root_path: str = "", spec_version: str = "2.4") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": root_path + path,
        "raw_path": (root_path + path).encode(),
        "query_string": b"",
        "root_path": root_path,
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }


async def nothing_more() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", ["/endless", "/ok/3"])
async def test_client_found_gone_while_sending_is_a_disconnect(sqlite_url: str, path: str) -> None:
    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    with recorded() as events:
        async with asyncio.timeout(10):
            with pytest.raises(Exception):  # noqa: B017, PT011 - whichever Starlette makes of it
                await served(sqlite_url)(scope_of(path), nothing_more, send)
    assert [(event.status, event.outcome) for event in requests(events)] == [(200, "disconnected")]


async def test_client_gone_by_its_own_message_is_a_disconnect(sqlite_url: str) -> None:
    started = asyncio.Event()

    async def receive() -> Any:
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            started.set()

    with recorded() as events:
        async with asyncio.timeout(10):
            await served(sqlite_url)(scope_of("/endless", spec_version="2.3"), receive, send)
    assert [(event.status, event.outcome) for event in requests(events)] == [(200, "disconnected")]


async def test_event_without_a_status_is_logged_with_its_outcome(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "overdrive.request")
    task = asyncio.create_task(call(served(sqlite_url), "/slow"))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task])
    assert "GET /slow cancelled " in caplog.text


async def test_message_that_an_app_sends_to_everybody_stays_as_it_is(sqlite_url: str) -> None:
    start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}

    async def constant(_scope: Any, _receive: Any, send: Any) -> None:
        await send(start)
        await send({"type": "http.response.body", "body": b"same"})

    app = served(sqlite_url)
    app.mount("/constant", constant)
    first, second = [await call(app, "/constant/") for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert start["headers"] == []


# Templates


@pytest.mark.parametrize("path", ["/ok/3", "/v1/ok/3", "/v2/ok/3", "/mounted/ok/3"])
async def test_template_is_the_same_behind_a_root_path(sqlite_url: str, path: str) -> None:
    async def ignore(_message: Any) -> None: ...

    with recorded() as events:
        await served(sqlite_url)(scope_of(path, root_path="/behind/a/proxy"), nothing_more, ignore)
    assert [event.route for event in requests(events)] == [path.replace("3", "{number}")]


class CopiesScope:
    """What many middlewares do that change a path or a header on its way in."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope), receive, send)


async def test_template_is_known_behind_a_middleware_that_copies_the_scope(sqlite_url: str) -> None:
    app = served(sqlite_url)
    app.add_middleware(CopiesScope)
    with recorded() as events:
        await call(app, "/v1/ok/3")
    assert [event.route for event in requests(events)] == ["/v1/ok/{number}"]


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    async def __call__(self) -> str:
        return "answer"


async def test_endpoint_need_not_be_hashable(sqlite_url: str) -> None:
    app = served(sqlite_url)
    app.add_api_route("/object", Unhashable())
    with recorded() as events:
        answer = await call(app, "/object")
    assert (answer.status, answer.error) == (200, None)
    assert [event.route for event in requests(events)] == ["/object"]


async def test_mounted_app_with_pagination_of_its_own_is_part_of_the_request(sqlite_url: str) -> None:
    app, mounted = FastAPI(), FastAPI()
    Overdrive(app, database_url=sqlite_url)
    add_pagination(mounted)
    app.mount("/mount", mounted)
    seen: list[RequestContext | None] = []

    @mounted.get("/inner")
    async def inner(db: SessionDep) -> None:
        seen.append(current())

    with recorded() as events:
        answer = await call(app, "/mount/inner")
    [event] = requests(events)
    assert (answer.status, event.route) == (200, "/mount/inner")
    assert seen[0] is not None
    assert answer.headers["x-request-id"] == event.request_id == seen[0].request_id


# A commit that fails


class Handler:
    async def __call__(self, _request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse("object", 409)


async def handler(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse("coroutine function", 409)


def sync_handler(_request: Request, _error: Exception) -> JSONResponse:
    in_loop = threading.current_thread() is threading.main_thread()
    return JSONResponse("in the loop" if in_loop else "in a thread", 409)


@pytest.mark.parametrize(
    ("handle", "by"),
    [(Handler(), "object"), (handler, "coroutine function"), (sync_handler, "in a thread")],
)
async def test_failed_commit_is_answered_by_a_handler_of_any_kind(
    sqlite_url: str, handle: Callable[..., Any], by: str
) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)
    app.add_exception_handler(IntegrityError, handle)

    @app.post("/")
    async def endpoint(db: SessionDep) -> None:
        db.add(Item(name="orphan", parent_id=99))

    with tables(sqlite_url), recorded() as events:
        answer = await call(app, "/", "POST")
    assert (answer.status, json.loads(answer.body), answer.starts, answer.error) == (409, by, 1, None)
    assert [(event.status, event.outcome, event.route) for event in requests(events)] == [(409, "ok", "/")]
    await overdrive.aclose()


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
        (f"00-{TRACE}-{SPAN}-01-more", (None, None)),
        (f"00-{TRACE[1:]}-{SPAN}-01", (None, None)),
        (f"cc-{TRACE}-{SPAN}-011", (None, None)),
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


def test_on_a_socket_every_line_carries_the_id_of_its_response(sqlite_url: str, tmp_path: Path) -> None:
    handler = LogHandler(tmp_path / "log", level=logging.INFO)
    logging.root.addHandler(handler)
    level = logging.root.level
    logging.root.setLevel(logging.INFO)
    try:
        with on_uvicorn(served(sqlite_url)) as (host, port), httpx2.Client(base_url=f"http://{host}:{port}") as http:
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


def test_ids_differ_whoever_seeds_or_forks() -> None:
    script = (
        "import os, random, sys; from overdrive.middleware import _ids\n"
        "for _ in range(2):\n    random.seed(1); print(_ids.getrandbits(64))\n"
        "child = os.fork(); print(_ids.getrandbits(64)); sys.stdout.flush()\n"
        "child and os.waitpid(child, 0)"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(2)]
    ids = [line for run in runs for line in run.stdout.splitlines()]
    # What was printed before the fork is in the buffers of both.
    assert len(set(ids)) == 8


async def test_a_request_that_raises_stays_current_for_what_logs_the_failure(sqlite_url: str) -> None:
    app = served(sqlite_url)

    async def server(path: str) -> RequestContext | None:
        with suppress(RuntimeError):
            await call(app, path)
        return current()

    # In a task of its own, as every server has one for each request.
    left = await asyncio.create_task(server("/broken"))
    assert left is not None
    assert left.path == "/broken"
    assert await asyncio.create_task(server("/ok/1")) is None
    assert current() is None
