"""Gates in front of a real pool: who is refused, what it is told, and what needs no database is not held up."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support import Item, client, eventually, on_uvicorn, recorded, tables

from overdrive import (
    ConfigurationError,
    Overdrive,
    OverloadedError,
    SessionDep,
    SessionFactoryDep,
    Settings,
    SyncSessionDep,
    cached,
    health_router,
    priority,
)
from overdrive.admission.gate import Admission
from overdrive.admission.limit import Refusal, Waiter
from overdrive.instrumentation.events import RequestEvent
from overdrive.middleware import RequestPath
from overdrive.testing import caching

pytestmark = pytest.mark.anyio

Make = Callable[..., tuple[FastAPI, Overdrive]]

SLEEP = func.pg_sleep(0.05)


@pytest.fixture
async def served(postgres_url: str) -> AsyncIterator[Make]:
    """Makes an app, and closes what it has opened."""
    made: list[Overdrive] = []

    def make(**admission: Any) -> tuple[FastAPI, Overdrive]:
        app, overdrive = service(postgres_url, **admission)
        made.append(overdrive)
        return app, overdrive

    yield make
    for each in made:
        await each.aclose()


def service(url: str, **admission: Any) -> tuple[FastAPI, Overdrive]:
    """An app whose two connections are busy for 50 ms each: it can answer 40 requests a second."""
    app = FastAPI()
    settings = Settings(
        database_url=url,
        pool={"size": 2, "max_overflow": 0},
        admission={"max_wait": 0.5, **admission},
        log={"server_timing": True},
    )
    overdrive = Overdrive(app, settings=settings)

    @app.get("/slow")
    async def slow(db: SessionDep) -> str:
        await db.execute(select(SLEEP))
        return "done"

    @app.get("/twice")
    async def twice(sessions: SessionFactoryDep) -> str:
        for _ in range(2):
            async with sessions() as db:
                await db.execute(select(SLEEP))
        return "done"

    @app.get("/both")
    async def both(sessions: SessionFactoryDep) -> str:
        async def one() -> None:
            async with sessions() as db:
                await db.execute(select(SLEEP))

        await asyncio.gather(one(), one())
        return "done"

    @app.get("/plain")
    def plain(db: SyncSessionDep) -> str:
        db.execute(select(SLEEP))
        return "done"

    @app.get("/low")
    @priority("low")
    async def low(db: SessionDep) -> str:
        await db.execute(select(SLEEP))
        return "done"

    @priority("high")
    @app.get("/high")
    async def high(db: SessionDep) -> str:
        await db.execute(select(SLEEP))
        return "done"

    @app.get("/constant")
    async def constant() -> str:
        return "done"

    @app.get("/stream")
    async def stream(sessions: SessionFactoryDep) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            for _ in range(2):
                yield "chunk"
                async with sessions() as db:
                    await db.execute(select(SLEEP))

        return StreamingResponse(chunks())

    @app.post("/echo")
    async def echo(request: Request, db: SessionDep) -> dict[str, int]:
        await db.execute(select(SLEEP))
        return {"size": len(await request.body())}

    @app.websocket("/ws")
    async def talk(socket: WebSocket, sessions: SessionFactoryDep) -> None:
        await socket.accept()
        for _ in range(2):
            async with sessions() as db:
                await db.execute(select(SLEEP))
        await socket.send_text("done")
        await socket.close()

    app.include_router(health_router)
    return app, overdrive


@contextlib.asynccontextmanager
async def on_socket(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    with on_uvicorn(app) as (host, port):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=50)
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", limits=limits, timeout=20) as http:
            yield http


async def storm(http: httpx2.AsyncClient, paths: list[str], seconds: float, every: float) -> list[httpx2.Response]:
    """Ask for one of the paths after the other, at instants that do not wait for answers."""
    loop = asyncio.get_running_loop()
    start, tasks = loop.time(), []
    for number in range(int(seconds / every)):
        await asyncio.sleep(start + number * every - loop.time())
        tasks.append(asyncio.ensure_future(http.get(paths[number % len(paths)])))
    return await asyncio.gather(*tasks)


def counts(overdrive: Overdrive) -> dict[str, int]:
    return overdrive.admission.statistics()["default"]


def is_calm(overdrive: Overdrive) -> bool:
    pool: Any = overdrive.engine.pool
    return counts(overdrive)["inflight"] == counts(overdrive)["queued"] == pool.checkedout() == 0


async def test_in_a_storm_some_are_answered_and_others_refused_and_probes_and_constants_go_on(served: Make) -> None:
    app, overdrive = served()
    with recorded() as events:
        async with on_socket(app) as http:
            paths = ["/slow", "/slow", "/slow", "/slow", "/low", "/low", "/high", "/constant", "/live", "/ready"]
            answers = await storm(http, paths, 1.5, 0.005)
            await eventually(lambda: is_calm(overdrive))
            assert (await http.get("/slow")).status_code == 200
    by_path = {path: Counter(a.status_code for a in answers if a.url.path == path) for path in paths}
    # What needs no database, or is to be answered first, has had nothing to do with it.
    for path in ("/constant", "/live", "/ready"):
        assert set(by_path[path]) == {200}
    # Forty a second are possible, of which thirty are of high priority.
    share = {path: each[200] / each.total() for path, each in by_path.items()}
    assert share["/high"] > share["/slow"]
    assert by_path["/slow"][503] > 20
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused[0].json() == {"detail": "the service has too much to do; try again later", "code": "overloaded"}
    assert len({int(answer.headers["retry-after"]) for answer in refused}) > 1
    requests = [event for event in events if isinstance(event, RequestEvent)]
    assert {event.outcome for event in requests if event.status == 503} == {"shed"}
    assert {event.outcome for event in requests if event.status == 200} == {"ok"}
    # Those that were refused before their route was asked have one too.
    assert {event.route for event in requests if event.status == 503} <= {"/slow", "/low", "/high"}
    waited = [answer.headers["server-timing"] for answer in answers if answer.status_code == 200]
    assert any("queue;dur=" in timing for timing in waited)


async def test_low_priority_is_refused_first(served: Make) -> None:
    app, overdrive = served()
    async with client(app) as http:
        answers = await storm(http, ["/slow", "/low"], 1.2, 0.01)
    share = {
        path: sum(a.status_code == 200 for a in answers if a.url.path == path) / (len(answers) / 2)
        for path in ("/slow", "/low")
    }
    assert share["/slow"] > share["/low"]
    assert is_calm(overdrive)


async def test_sure_refusals_do_not_reach_their_route(served: Make) -> None:
    app, _ = served()
    reached = []

    @app.get("/counted")
    async def counted(db: SessionDep) -> str:
        reached.append(1)
        await db.execute(select(SLEEP))
        return "done"

    async with client(app) as http:
        await asyncio.gather(*(http.get("/counted") for _ in range(10)))
        for _ in range(25):
            await http.get("/counted")
        reached.clear()
        answers = await storm(http, ["/counted"], 1, 0.004)
    assert len(reached) < len(answers) / 2
    assert sum(answer.status_code == 200 for answer in answers) > 2


@pytest.mark.parametrize(("method", "left", "runs"), [("GET", True, 0), ("GET", False, 1), ("POST", True, 1)])
async def test_request_whose_client_has_left_is_not_begun_while_others_wait(
    served: Make, method: str, left: bool, runs: int
) -> None:
    app, overdrive = served()
    bodies: list[bytes] = []

    @app.api_route("/reads", methods=["GET", "POST"])
    async def reads(request: Request) -> str:
        with contextlib.suppress(ClientDisconnect):
            bodies.append(b"")
            bodies[-1] = await request.body()
        return "done"

    body = {"type": "http.request", "body": b"body", "more_body": False}
    messages = [{"type": "http.disconnect"} if left else body]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(_message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": method, "path": "/reads", "raw_path": b"/reads", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"test")], "http_version": "1.1", "scheme": "http", "asgi": {"spec_version": "2.4"},
    }  # fmt: skip
    async with client(app) as http:
        waiting = [asyncio.ensure_future(http.get("/slow")) for _ in range(6)]
        await eventually(lambda: counts(overdrive)["queued"] > 0)
        with recorded() as events:
            await app(scope, receive, send)
        await asyncio.gather(*waiting)
    assert bodies == ([b""] if left else [b"body"]) * runs
    assert [event.outcome for event in events if isinstance(event, RequestEvent) and event.path == "/reads"] == [
        "ok" if runs else "disconnected"
    ]


async def test_streams_are_not_cut_off(served: Make) -> None:
    app, overdrive = served(max_wait=0.01)
    async with client(app) as http:
        answers = await asyncio.gather(*(http.get("/stream") for _ in range(8)))
    assert {answer.text for answer in answers} == {"chunkchunk"}
    assert counts(overdrive)["admitted"] == 0


async def test_request_that_has_given_its_connection_back_takes_nobodys_turn(served: Make) -> None:
    app, _ = served()

    @app.get("/calls-others")
    async def calls_others(sessions: SessionFactoryDep) -> str:
        async with sessions() as db:
            await db.execute(select(1))
        # One of these is longer than anybody may wait.
        await asyncio.sleep(0.6)
        return "done"

    async with client(app) as http:
        # On a machine with much to do it takes long to connect.
        await asyncio.gather(*(http.get("/slow") for _ in range(2)))
        answers = await asyncio.gather(*(http.get("/calls-others") for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}


async def test_what_was_begun_is_not_refused(served: Make) -> None:
    app, _ = served()
    begun = []

    @app.get("/steps")
    async def steps(sessions: SessionFactoryDep) -> str:
        for _ in range(3):
            async with sessions() as db:
                await db.execute(select(SLEEP))
            begun.append(1)
        return "done"

    async with client(app) as http:
        answers = await storm(http, ["/steps"], 0.6, 0.01)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    assert len(begun) == 3 * statuses[200]


@pytest.mark.parametrize("path", ["/slow", "/twice", "/both", "/plain", "/stream"])
async def test_few_at_once_are_all_answered_whatever_they_are(served: Make, path: str) -> None:
    app, overdrive = served(max_wait=5)
    async with client(app) as http:
        answers = await asyncio.gather(*(http.get(path) for _ in range(6)))
    assert {answer.status_code for answer in answers} == {200}
    name = "default"
    assert overdrive.admission.statistics()[name]["inflight"] == 0
    await eventually(lambda: is_calm(overdrive))


async def test_body_that_came_while_its_request_waited_is_read(served: Make) -> None:
    app, overdrive = served(max_wait=5)
    async with on_socket(app) as http:
        answers = await asyncio.gather(*(http.post("/echo", content=b"x" * 200_000) for _ in range(6)))
        small = await asyncio.gather(*(http.post("/echo", content=b"x") for _ in range(6)))
    assert [answer.json() for answer in answers] == [{"size": 200_000}] * 6
    assert [answer.json() for answer in small] == [{"size": 1}] * 6
    assert counts(overdrive)["admitted"] == 12


async def test_client_that_hangs_up_leaves_the_queue(served: Make) -> None:
    app, overdrive = served(max_wait=20)

    @app.get("/hold")
    async def hold(db: SessionDep) -> None:
        await db.execute(text("SELECT pg_sleep(0.6)"))

    async with on_socket(app) as http:
        held = [asyncio.ensure_future(http.get("/hold")) for _ in range(2)]
        await eventually(lambda: counts(overdrive)["inflight"] == 2)
        waiting = [asyncio.ensure_future(http.get("/slow")) for _ in range(5)]
        await eventually(lambda: counts(overdrive)["queued"] == 5)
        for task in waiting[:3]:
            task.cancel()
        await eventually(lambda: counts(overdrive)["queued"] == 2)
        assert counts(overdrive)["refused_left"] == 3
        assert not any(task.done() for task in held)
        assert [(await task).status_code for task in waiting[3:]] == [200, 200]
        await asyncio.gather(*held)
    await eventually(lambda: is_calm(overdrive))


async def test_cancelled_requests_leave_nothing_behind(served: Make) -> None:
    app, overdrive = served(max_wait=20)
    async with client(app) as http:
        for delay in (0.0, 0.01, 0.03, 0.06, 0.1):
            tasks = [asyncio.ensure_future(http.get(path)) for path in ("/slow", "/twice", "/both") * 4]
            await asyncio.sleep(delay)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: is_calm(overdrive))
        assert (await http.get("/slow")).status_code == 200


def test_websockets_are_not_refused(postgres_url: str) -> None:
    app, overdrive = service(postgres_url)
    with TestClient(app) as http, http.websocket_connect("/ws") as socket:
        assert socket.receive_text() == "done"
    assert counts(overdrive)["admitted"] == 0


async def test_switched_off_it_refuses_and_counts_nothing(served: Make) -> None:
    app, overdrive = served(enabled=False, max_wait=0.1)
    async with client(app) as http:
        answers = await asyncio.gather(*(http.get("/slow") for _ in range(15)))
    assert {answer.status_code for answer in answers} == {200}
    assert overdrive.admission.statistics() == {}


async def test_teams_own_engine_and_dependency_are_guarded_too(postgres_url: str) -> None:
    engine: AsyncEngine = create_async_engine(
        postgres_url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=1, pool_timeout=20
    )
    app = FastAPI()
    overdrive = Overdrive(app, settings=Settings(admission={"max_wait": 0.3}), engine=engine)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    @app.get("/own")
    async def own(db: AsyncSession = Depends(get_db)) -> str:  # noqa: B008
        await db.execute(select(SLEEP))
        return "done"

    async with client(app) as http:
        answers = await storm(http, ["/own"], 1, 0.005)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    assert statuses[200] > 2
    assert is_calm(overdrive)
    await engine.dispose()


async def test_expired_copy_is_served_where_the_route_allows_it_and_made_anew(served: Make, postgres_url: str) -> None:
    app, overdrive = served()

    @app.get("/kept/{number}")
    @cached(ttl=10, stale_if_error=600)
    async def kept(number: int, db: SessionDep) -> list[str]:
        names = list(await db.scalars(select(Item.name)))
        # With its connection: what sleeps in the database is not known to be pure.
        await asyncio.sleep(0.05)
        return names

    with tables(postgres_url):
        async with client(app) as http:
            with caching(overdrive) as clock:
                paths = [f"/kept/{number}" for number in range(8)]
                for path in paths:
                    assert (await http.get(path)).status_code == 200
                clock.tick(15)
                answers = await storm(http, [*paths, "/slow", "/slow", "/slow", "/slow"], 1.2, 0.003)
                kept_answers = [answer for answer in answers if "kept" in answer.url.path]
                assert {answer.status_code for answer in kept_answers} == {200}
                said = Counter(answer.headers["cache-status"] for answer in kept_answers)
                assert said["overdrive; hit; ttl=-5; detail=overloaded"] > 0
                assert 503 in {answer.status_code for answer in answers if "slow" in answer.url.path}
                await eventually(lambda: is_calm(overdrive))


async def test_request_with_an_expired_copy_does_not_wait_while_a_delay_stands(served: Make, postgres_url: str) -> None:
    app, overdrive = served()

    @app.get("/kept")
    @cached(ttl=10, stale_if_error=600)
    async def kept(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    with tables(postgres_url), caching(overdrive) as clock:
        async with client(app) as http:
            await http.get("/kept")
            (gate,) = overdrive.admission._gates["default"]
            gate.queue.at_work, gate.queue.stands = 2, True
            clock.tick(15)
            answer = await http.get("/kept")
            gate.queue.at_work, gate.queue.stands = 0, False
    assert answer.headers["cache-status"] == "overdrive; hit; ttl=-5; detail=overloaded"
    assert counts(overdrive)["refused_late"] == 0


async def test_what_is_sent_in_place_of_a_refusal_is_made_anew_behind_its_client(
    served: Make, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, overdrive = served()
    made = []

    @app.get("/kept")
    @cached(ttl=10, stale_if_error=600)
    async def kept(db: SessionDep) -> list[str]:
        made.append(1)
        return list(await db.scalars(select(Item.name)))

    with tables(postgres_url), caching(overdrive) as clock:
        async with client(app) as http:
            await http.get("/kept")
            (gate,) = overdrive.admission._gates["default"]
            overdrive.admission._needs = dict.fromkeys(overdrive.admission._needs, (gate, 1.0))
            refusals = [None, Refusal("wait")]
            monkeypatch.setattr(Admission, "refuses", True)
            monkeypatch.setattr(gate.queue, "refuse", lambda *_: refusals.pop() if refusals else None)
            clock.tick(15)
            answer = await http.get("/kept")
            assert answer.headers["cache-status"] == "overdrive; hit; ttl=-5; detail=overloaded"
            await eventually(lambda: len(made) == 2)
            assert not refusals
            await eventually(lambda: is_calm(overdrive))
            assert (await http.get("/kept")).headers["cache-status"] == "overdrive; hit; ttl=10"
            assert len(made) == 2


@contextlib.contextmanager
def shut(app: FastAPI, overdrive: Overdrive, *paths: str) -> Iterator[None]:
    """Have the gate refuse in the block whoever needs it, of whom these routes are known to be."""
    (gate,) = overdrive.admission._gates["default"]
    gate.queue.at_work, gate.queue.stands, gate.queue._service = 2, True, 0.05
    others = [Waiter("normal", 0.0) for _ in range(8)]
    gate.queue._waiting["normal"].update(dict.fromkeys(others))
    endpoints = [route.endpoint for route in app.routes if isinstance(route, APIRoute) and route.path in paths]
    overdrive.admission._needs.update({id(endpoint): (gate, 1.0) for endpoint in endpoints})
    yield
    for other in others:
        del gate.queue._waiting["normal"][other]
    gate.queue.at_work, gate.queue.stands = 0, False


class Framed:
    """A middleware of the team's, which marks what passes it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-framed", b"yes")]
            await send(message)

        await self.app(scope, receive, marked)


async def test_sure_refusal_is_the_same_wherever_it_is_answered_and_has_its_event(
    served: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[str] = []
    serve = RequestPath.__call__

    async def noted(self: RequestPath, scope: Scope, receive: Receive, send: Send) -> None:
        inner.append(scope["path"])
        await serve(self, scope, receive, send)

    monkeypatch.setattr(RequestPath, "__call__", noted)
    answers, events = [], []
    for framed in (False, True):
        app, overdrive = served()
        if framed:
            app.add_middleware(Framed)
        with recorded() as told:
            async with client(app) as http:
                await http.get("/constant")
                inner.clear()
                with shut(app, overdrive, "/slow"):
                    answers.append(await http.get("/slow?of=much"))
                    assert (await http.get("/constant")).status_code == 200
                assert inner == [*["/slow"] * framed, "/constant"]
                assert counts(overdrive)["refused_wait"] == 1
        events += [event for event in told if isinstance(event, RequestEvent) and event.path == "/slow"]
    plain, inside = answers
    assert (plain.status_code, plain.content) == (inside.status_code, inside.content)
    assert {*plain.headers} | {"x-framed"} == {*inside.headers}
    assert "total;dur=" in plain.headers["server-timing"]
    for event in events:
        assert (event.status, event.outcome, event.route) == (503, "shed", "/slow")
        assert event.bytes_sent == len(plain.content)
    assert len(events) == 2


async def test_teams_own_handler_and_tenants_have_their_say_in_refusals(served: Make, postgres_url: str) -> None:
    app, overdrive = served()

    @app.exception_handler(OverloadedError)
    async def tell(_request: Request, error: OverloadedError) -> PlainTextResponse:
        return PlainTextResponse(f"come back: {error.reason}", 429)

    async with client(app) as http:
        await http.get("/constant")
        with shut(app, overdrive, "/slow"):
            assert (await http.get("/slow")).text == "come back: wait"

    asked: list[str] = []

    def tenant(request: Request) -> str:
        asked.append(request.url.path)
        return "acme"

    app = FastAPI()
    settings = Settings(database_url=postgres_url, pool={"size": 2, "max_overflow": 0})
    overdrive = Overdrive(app, settings=settings, tenant=tenant)

    @app.get("/mine")
    async def mine(db: SessionDep) -> None: ...

    async with client(app) as http:
        with shut(app, overdrive, "/mine"):
            assert (await http.get("/mine")).status_code == 503
    assert asked == ["/mine"]
    await overdrive.aclose()


@pytest.mark.parametrize("framed", [False, True])
async def test_connection_of_a_request_refused_before_its_body_came_is_of_use_yet(served: Make, framed: bool) -> None:
    app, overdrive = served()
    if framed:
        app.add_middleware(Framed)
    with on_uvicorn(app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)

        async def answer() -> tuple[bytes, bytes]:
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"content-length: (\d+)", head)
            return head.split()[1], await reader.readexactly(int(length))

        body = b"x" * 1_000_000
        writer.write(b"GET /constant HTTP/1.1\r\nHost: h\r\n\r\n")
        await answer()
        with shut(app, overdrive, "/echo", "/slow"):
            for _ in range(2):
                writer.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body))
                assert (await answer())[0] == b"503"
                writer.write(body)
            # One after the other, without waiting for the answers (RFC 9112, section 9.3.2).
            asked = [b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path for path in (b"/slow", b"/constant", b"/slow")]
            writer.write(b"".join(asked))
            assert [(await answer())[0] for _ in asked] == [b"503", b"200", b"503"]
        writer.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert await answer() == (b"200", b'{"size":1000000}')
        writer.close()
        await writer.wait_closed()


async def test_request_whose_time_would_run_out_in_the_queue_is_refused_at_once(postgres_url: str) -> None:
    app = FastAPI()
    pool = {"size": 1, "max_overflow": 0, "deadline_header": "x-timeout-ms"}
    overdrive = Overdrive(app, settings=Settings(database_url=postgres_url, pool=pool, admission={"max_wait": 20}))

    @app.get("/slow")
    async def slow(db: SessionDep) -> str:
        await db.execute(select(func.pg_sleep(0.3)))
        return "done"

    async with client(app) as http:
        await http.get("/slow")
        held = [asyncio.ensure_future(http.get("/slow")) for _ in range(2)]
        await eventually(lambda: counts(overdrive)["queued"] == 1)
        hurried = [await http.get("/slow", headers={"x-timeout-ms": "400"}) for _ in range(3)]
        assert {answer.json()["code"] for answer in hurried} == {"overloaded"}
        assert counts(overdrive)["refused_deadline"] == 3
        patient = await http.get("/slow", headers={"x-timeout-ms": "20000"})
        assert {answer.status_code for answer in (patient, *await asyncio.gather(*held))} == {200}
    await overdrive.aclose()


def test_priority_takes_one_of_three_levels() -> None:
    with pytest.raises(ConfigurationError, match='takes "high", "normal" or "low", not \'urgent\''):
        priority("urgent")  # type: ignore[arg-type]
