"""Requests of every outcome, mixed, and the events they are told by."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from random import Random
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from overdrive import LogHandler, Overdrive, Settings, bind

#: What becomes of each kind of request: its outcome and status.
BECOMES: dict[str, tuple[str, int | None]] = {
    "ok": ("ok", 200),
    "plain": ("ok", 200),
    "raise": ("error", 500),
    "refuse": ("ok", 418),
    "missing": ("ok", 404),
    "invalid": ("ok", 422),
    "disconnect": ("disconnected", 200),
    "cancel": ("cancelled", None),
    "abort": ("error", 200),
    "socket": ("ok", None),
    "socket-raise": ("error", None),
}


class Event(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    timestamp: AwareDatetime
    severity: Literal["INFO"]
    logger: Literal["overdrive.request"]
    message: str
    request_id: str
    trace_id: str | None = None
    span_id: str | None = None
    method: Literal["GET", "WEBSOCKET"]
    path: str
    route: str | None
    status: int | None
    outcome: Literal["ok", "error", "cancelled", "disconnected"]
    duration: NonNegativeFloat
    bytes_sent: NonNegativeInt
    cache_status: None
    page_style: None
    pool_wait: NonNegativeFloat
    statements: NonNegativeInt
    database_time: NonNegativeFloat
    rows: NonNegativeInt
    name: str | None = None


def _app() -> FastAPI:
    app = FastAPI()
    Overdrive(app, settings=Settings(database_url="sqlite+aiosqlite://"))

    @app.get("/ok/{name}")
    async def ok(name: str) -> str:
        bind(name=name)
        return name

    @app.get("/plain/{name}")
    def plain(name: str) -> str:
        bind(name=name)
        return name

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise RuntimeError(name)

    @app.get("/refuse/{name}")
    async def refuse(name: str) -> None:
        raise HTTPException(418)

    @app.get("/invalid/{name}")
    async def invalid(name: int) -> None:
        pass

    @app.get("/cancel/{name}")
    async def cancel(name: str) -> None:
        await asyncio.Event().wait()

    @app.get("/disconnect/{name}")
    @app.get("/abort/{name}")
    async def broken_off(name: str) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "one"
            await asyncio.sleep(0)
            if "abort" in name:
                raise RuntimeError(name)
            yield "two"

        return StreamingResponse(chunks())

    @app.websocket("/socket/{name}")
    @app.websocket("/socket-raise/{name}")
    async def socket(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        if "raise" in name:
            raise RuntimeError(name)
        await websocket.close()

    return app


async def _ask(app: FastAPI, kind: str, number: int) -> None:
    sent = 0

    async def receive() -> dict[str, Any]:
        if kind.startswith("socket"):
            return {"type": "websocket.connect"}
        if sent:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if kind == "disconnect" and sent > 2:
            raise OSError("gone")

    scope: dict[str, Any] = {
        "type": "websocket" if kind.startswith("socket") else "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "path": f"/{kind}/{kind}-{number}",
        "query_string": b"",
        "headers": [(b"traceparent", b"00-%032x-%016x-01" % (number + 1, number + 1))] if number % 3 else [],
        "subprotocols": [],
    }
    if scope["type"] == "http":
        scope["method"] = "GET"
    task = asyncio.ensure_future(app(scope, receive, send))
    if kind == "cancel":
        await asyncio.sleep(0.001)
        task.cancel()
    # What is raised is what the app has asked for; a client that is gone is told of by Starlette.
    with suppress(Exception, asyncio.CancelledError):
        await task


async def play(count: int, seed: int) -> None:
    """Have `count` requests served, twenty at once, and check that each has its one event."""
    stream = io.StringIO()
    logger = logging.getLogger("overdrive.request")
    level, propagate = logger.level, logger.propagate
    handler = LogHandler(stream=stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        app = _app()
        kinds = Random(seed).choices(list(BECOMES), k=count)
        numbered = iter(list(enumerate(kinds)))

        async def client() -> None:
            for number, kind in numbered:
                await _ask(app, kind, number)

        await asyncio.gather(*(client() for _ in range(20)))
        await app.state.overdrive_installation.runtime.aclose()
        handler.flush()
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
    told: Counter[str] = Counter()
    for line in stream.getvalue().splitlines():
        event = Event.model_validate_json(line)
        told[event.path] += 1
        kind = event.path.split("/")[1]
        assert (event.outcome, event.status) == BECOMES[kind], line
        assert event.route == (None if kind == "missing" else f"/{kind}/{{name}}")
        assert (event.name is not None) == (kind in ("ok", "plain"))
        assert json.loads(line)["message"].startswith(f"{event.method} {event.path} ")
    assert told == Counter(f"/{kind}/{kind}-{number}" for number, kind in enumerate(kinds))
    stats = handler.stats
    assert stats.emitted == stats.written == count
