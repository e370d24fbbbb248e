"""A request's session ends before the first byte: promises 3 and 4, on every driver, route and kind of response."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware
from support import Item, call, client, names, recorded, tables

from overdrive import (
    ConfigurationError,
    Overdrive,
    RequestSession,
    SessionDep,
    SessionEndedError,
    SessionFactoryDep,
    SyncRequestSession,
    SyncSessionDep,
)

pytestmark = pytest.mark.anyio

KINDS = ["json", "response", "stream", "file"]
PLACES = ["", "/router", "/mount"]


def routes(router: Any) -> None:
    """The same endpoints, for an app, a router and a mounted app."""

    @router.post("/json")
    async def json(db: SessionDep, name: str, parent: int | None = None) -> dict[str, str]:
        db.add(Item(name=name, parent_id=parent))
        return {"name": name}

    @router.post("/response")
    async def response(db: SessionDep, name: str, parent: int | None = None) -> Any:
        db.add(Item(name=name, parent_id=parent))
        return PlainTextResponse(name)

    @router.post("/stream")
    async def stream(db: SessionDep, name: str, parent: int | None = None) -> Any:
        db.add(Item(name=name, parent_id=parent))

        async def chunks() -> AsyncIterator[str]:
            for _ in range(3):
                yield name

        return StreamingResponse(chunks())

    @router.post("/file")
    async def file(db: SessionDep, name: str, parent: int | None = None) -> Any:
        db.add(Item(name=name, parent_id=parent))
        return FileResponse(Path(__file__))

    @router.post("/sync")
    def sync(db: SyncSessionDep, name: str, parent: int | None = None) -> dict[str, str]:
        db.add(Item(name=name, parent_id=parent))
        return {"name": name}

    @router.post("/refused")
    async def refused(db: SessionDep, name: str) -> Any:
        db.add(Item(name=name))
        await db.flush()
        return JSONResponse({"name": name}, 409)

    @router.post("/raised")
    async def raised(db: SessionDep, name: str) -> Any:
        db.add(Item(name=name))
        await db.flush()
        raise HTTPException(404)

    @router.post("/broken")
    async def broken(db: SessionDep, name: str) -> Any:
        db.add(Item(name=name))
        await db.flush()
        raise RuntimeError("broken")

    @router.post("/invalid", response_model=int)
    async def invalid(db: SessionDep, name: str) -> Any:
        db.add(Item(name=name))
        await db.flush()
        return "not an integer"

    @router.post("/sync-refused")
    def sync_refused(db: SyncSessionDep, name: str) -> Any:
        db.add(Item(name=name))
        db.flush()
        return JSONResponse({"name": name}, 400)


def served(url: str, *, handler: bool = True) -> tuple[FastAPI, Overdrive]:
    app, router, mounted = FastAPI(), APIRouter(), FastAPI()
    overdrive = Overdrive(app, database_url=url)
    for each in (app, router, mounted):
        routes(each)
    app.include_router(router, prefix="/router")
    app.mount("/mount", mounted)

    async def conflict(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"conflict": True}, 409)

    if handler:
        for each in (app, mounted):
            each.add_exception_handler(IntegrityError, conflict)
    return app, overdrive


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        yield engine


def held(overdrive: Overdrive) -> int:
    return overdrive.engine.sync_engine.pool.checkedout()  # type: ignore[attr-defined]


async def test_row_is_committed_and_connection_back_at_first_byte(url: str, database: Engine) -> None:
    app, overdrive = served(url)
    seen: list[Any] = []
    kept: list[str] = []
    for place, kind in product(PLACES, [*KINDS, "sync"]):
        path = f"{place}/{kind}"
        kept.append(path)
        answer = await call(
            app, f"{path}?name={path}", "POST", at_start=lambda: seen.append((names(database), held(overdrive)))
        )
        assert (answer.status, answer.error) == (200, None), path
        assert seen.pop() == (kept, 0), path
        assert not seen, path
    await overdrive.aclose()


@pytest.mark.parametrize("path", ["refused", "raised", "broken", "invalid", "sync-refused"])
async def test_status_from_400_rolls_back(url: str, database: Engine, path: str) -> None:
    app, overdrive = served(url)
    answer = await call(app, f"/{path}?name=lost", "POST")
    assert answer.status >= 400
    assert names(database) == []
    assert held(overdrive) == 0
    await overdrive.aclose()


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_failing_commit_is_answered_by_the_apps_own_handler(
    url: str, database: Engine, spec_version: str
) -> None:
    app, overdrive = served(url)
    for place, kind in product(PLACES, [*KINDS, "sync"]):
        path = f"{place}/{kind}"
        answer = await call(app, f"{path}?name=orphan&parent=99", "POST", spec_version=spec_version)
        assert (answer.status, answer.body, answer.starts) == (409, b'{"conflict":true}', 1), path
        assert names(database) == [], path
        assert held(overdrive) == 0, path
    await overdrive.aclose()


async def test_failing_commit_without_a_handler_is_a_server_error(url: str, database: Engine) -> None:
    app, overdrive = served(url, handler=False)
    for place, kind in product(PLACES, KINDS):
        path = f"{place}/{kind}"
        answer = await call(app, f"{path}?name=orphan&parent=99", "POST")
        assert (answer.status, answer.starts, answer.body) == (500, 1, b"Internal Server Error"), path
        # The server is told, so that the failure is in its log.
        assert isinstance(answer.error, IntegrityError), path
    await overdrive.aclose()


async def test_failing_commit_behind_base_http_middleware_inside_and_outside(sqlite_url: str) -> None:
    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    with tables(sqlite_url) as database:
        app, overdrive = served(sqlite_url)
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
        inner = FastAPI()
        routes(inner)
        inner.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
        app.mount("/wrapped", inner)
        for path, status in (("/json", 409), ("/stream", 409), ("/wrapped/json", 500), ("/wrapped/stream", 500)):
            answer = await call(app, f"{path}?name=orphan&parent=99", "POST")
            assert (answer.status, answer.starts) == (status, 1), path
        assert names(database) == []
        await overdrive.aclose()


class Stubborn(PlainTextResponse):
    """A response that goes on sending whatever it is told."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except BaseException:
            await send({"type": "http.response.body", "body": b"uncommitted"})
            raise


async def test_nothing_of_the_response_leaves_after_a_failed_commit(sqlite_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)

    @app.post("/")
    async def endpoint(db: SessionDep) -> Any:
        db.add(Item(name="x", parent_id=99))
        return Stubborn("x")

    with tables(sqlite_url):
        answer = await call(app, "/", "POST")
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    await overdrive.aclose()


async def test_background_task_does_not_run_after_a_failed_commit(sqlite_url: str) -> None:
    ran: list[str] = []
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)

    @app.post("/")
    async def endpoint(db: SessionDep, tasks: BackgroundTasks, parent: int | None = None) -> None:
        tasks.add_task(ran.append, "ran")
        db.add(Item(name="x", parent_id=parent))

    with tables(sqlite_url):
        assert (await call(app, "/?parent=99", "POST")).status == 500
        assert ran == []
        assert (await call(app, "/", "POST")).status == 200
        assert ran == ["ran"]
    await overdrive.aclose()


def always(_status: int) -> bool:
    return True


async def test_commit_on_decides_for_one_route(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.post("/audited")
    async def audited(db: Annotated[AsyncSession, Depends(RequestSession(commit_on=always))]) -> None:
        db.add(Item(name="attempt"))
        raise HTTPException(403)

    @app.post("/sync-audited")
    def sync_audited(db: Annotated[Session, Depends(SyncRequestSession(commit_on=always))]) -> None:
        db.add(Item(name="sync attempt"))
        raise HTTPException(403)

    assert (await call(app, "/audited", "POST")).status == 403
    assert (await call(app, "/sync-audited", "POST")).status == 403
    assert names(database) == ["attempt", "sync attempt"]
    await overdrive.aclose()


async def test_no_statement_no_connection(url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/")
    async def endpoint(db: SessionDep) -> bool:
        return db.in_transaction()

    assert (await call(app, "/")).body == b"false"
    pool: Any = overdrive.engine.sync_engine.pool
    assert pool.checkedin() + pool.checkedout() == 0
    await overdrive.aclose()


# Use after the end


@pytest.mark.parametrize("use", ["execute", "get", "add", "commit", "refresh"])
async def test_using_the_ended_session_is_loud_and_names_the_fix(url: str, database: Engine, use: str) -> None:
    errors: list[BaseException] = []
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    async def misuse(db: Any, item: Item) -> None:
        actions = {
            "execute": lambda: db.execute(select(Item)),
            "get": lambda: db.get(Item, 1),
            "commit": db.commit,
            "refresh": lambda: db.refresh(item),
        }
        try:
            if use == "add":
                db.add(Item(name="silently lost?"))
            else:
                await actions[use]()
        except Exception as error:
            errors.append(error)

    @app.post("/")
    async def endpoint(db: SessionDep, tasks: BackgroundTasks) -> None:
        item = Item(name="x")
        db.add(item)
        await db.flush()
        tasks.add_task(misuse, db, item)
        tasks.add_task(misuse, db, item)

    assert (await call(app, "/", "POST")).status == 200
    assert len(errors) == 2
    if use != "refresh":  # SQLAlchemy's own complaint about a detached object comes first
        assert isinstance(errors[0], SessionEndedError)
        assert "SessionFactoryDep" in str(errors[0])
        assert isinstance(errors[1], SessionEndedError)
    assert held(overdrive) == 0
    assert names(database) == ["x"]
    await overdrive.aclose()


async def test_stream_that_uses_the_requests_session_fails_without_a_leak(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/")
    async def endpoint(db: SessionDep) -> StreamingResponse:
        async def rows() -> AsyncIterator[str]:
            for row in await db.scalars(select(Item.name)):
                yield row

        return StreamingResponse(rows())

    answer = await call(app, "/", spec_version="2.4")
    assert isinstance(answer.error, SessionEndedError)
    assert held(overdrive) == 0
    await overdrive.aclose()


async def fail(sessions: Any) -> None:
    async with sessions() as db:
        db.add(Item(name="undone"))
        await db.flush()
        raise ZeroDivisionError


async def test_factory_serves_background_tasks_and_streams(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    async def afterwards(sessions: Any) -> None:
        async with sessions() as db:
            db.add(Item(name="background"))
        with pytest.raises(ZeroDivisionError):
            await fail(sessions)

    @app.get("/")
    async def endpoint(sessions: SessionFactoryDep, tasks: BackgroundTasks) -> StreamingResponse:
        async def rows() -> AsyncIterator[str]:
            async with sessions() as db:
                db.add(Item(name="streamed"))
            async with sessions() as db:
                for name in await db.scalars(select(Item.name)):
                    yield name

        tasks.add_task(afterwards, sessions)
        return StreamingResponse(rows())

    answer = await call(app, "/")
    assert (answer.body, answer.error) == (b"streamed", None)
    assert names(database) == ["streamed", "background"]
    assert held(overdrive) == 0
    await overdrive.aclose()


def test_websocket_gets_a_factory_and_is_refused_a_session(sqlite_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)

    @app.websocket("/ws")
    async def talk(socket: WebSocket, sessions: SessionFactoryDep) -> None:
        await socket.accept()
        async with sessions() as db:
            db.add(Item(name=await socket.receive_text()))
        await socket.send_text("kept")
        await socket.close()

    with tables(sqlite_url) as database, TestClient(app) as http:
        with http.websocket_connect("/ws") as socket:
            socket.send_text("said")
            assert socket.receive_text() == "kept"
        assert names(database) == ["said"]

    refused = FastAPI()
    Overdrive(refused, database_url=sqlite_url)

    @refused.websocket("/ws")
    async def bad(socket: WebSocket, db: SessionDep) -> None: ...

    with pytest.raises(ConfigurationError, match=r"/ws is a websocket.*SessionFactoryDep"), TestClient(refused):
        pass
    assert overdrive.engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_generator_endpoint_with_a_session_is_refused_at_start(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url)

    @app.get("/lines")
    async def lines(db: SessionDep) -> AsyncIterator[int]:
        yield 1

    answer = await call(app, "/lines")
    assert isinstance(answer.error, ConfigurationError)
    assert "GET /lines is a generator" in str(answer.error)


async def test_plain_function_with_an_async_session_is_refused_at_start(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url)

    @app.get("/users")
    def users(db: SessionDep) -> None: ...

    answer = await call(app, "/users")
    assert "SyncSessionDep" in str(answer.error)


async def test_request_context_reports_what_happened(url: str, database: Engine) -> None:
    app, overdrive = served(url)
    with recorded() as events:
        async with client(app) as http:
            await http.post("/router/json?name=x")
    event = next(event for event in events if type(event).__name__ == "RequestEvent")
    assert (event.route, event.status, event.outcome) == ("/router/json", 200, "ok")
    assert event.statements >= 1
    assert event.database_time > 0
    assert event.pool_wait > 0
    await overdrive.aclose()
