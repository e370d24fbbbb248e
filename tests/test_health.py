"""What an orchestrator asks, from start-up to SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support import client, eventually

from overdrive import Overdrive, Settings, create_engine, health_router

pytestmark = pytest.mark.anyio

UNREADY = {"status": "unready"}


def served(url: str, **admission: Any) -> tuple[FastAPI, Overdrive]:
    app = FastAPI()
    pool = {"size": 2, "max_overflow": 0}
    overdrive = Overdrive(app, settings=Settings(database_url=url, pool=pool, admission=admission))
    app.include_router(health_router)
    return app, overdrive


async def test_service_is_ready_from_its_start_to_its_end(sqlite_url: str) -> None:
    app, overdrive = served(sqlite_url)
    async with client(app) as http:
        for state in ("starting", "draining"):
            overdrive.readiness.state = state  # type: ignore[assignment]
            assert (await http.get("/live")).status_code == 200
            answer = await http.get("/ready")
            assert (answer.status_code, answer.json()) == (503, UNREADY | {"reason": state})
        with TestClient(app) as inside:
            assert inside.get("/ready").json() == {"status": "ready"}
        assert (await http.get("/ready")).json() == UNREADY | {"reason": "draining"}


async def test_database_that_is_away_is_noticed_and_so_is_that_it_is_back(postgres_url: str) -> None:
    app, overdrive = served(postgres_url, away_after=0)
    readiness, engine = overdrive.readiness, overdrive.engine
    # Nobody listens there.
    elsewhere = create_engine(engine.url.set(host="127.0.0.1", port=1, query={}))
    async with client(app) as http:
        for asked, status in ((engine, 200), (elsewhere, 503), (engine, 200)):
            readiness._engine, readiness._asked_at = asked, float("-inf")
            answer = await http.get("/ready")
            assert answer.status_code == status
            assert answer.json() == ({"status": "ready"} if status == 200 else UNREADY | {"reason": "database"})
    await elsewhere.dispose()
    await overdrive.aclose()


async def test_database_may_be_away_for_a_moment(postgres_url: str) -> None:
    app, overdrive = served(postgres_url, away_after=5)
    overdrive.readiness._engine = create_engine(overdrive.engine.url.set(host="127.0.0.1", port=1, query={}))
    async with client(app) as http:
        assert (await http.get("/ready")).status_code == 200
    assert overdrive.readiness._away_since is not None
    await overdrive.aclose()


async def test_many_who_ask_are_one_question_to_the_database(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, overdrive = served(postgres_url)
    asked = 0
    ask = overdrive.readiness._ask

    async def counted() -> None:
        nonlocal asked
        asked += 1
        await ask()

    monkeypatch.setattr(overdrive.readiness, "_ask", counted)
    async with client(app) as http:
        answers = await asyncio.gather(*(http.get("/ready") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert asked == 1
    await overdrive.aclose()


async def test_busy_database_is_not_away(postgres_url: str) -> None:
    app, overdrive = served(postgres_url, away_after=0)
    overdrive.readiness._asked_at = 0
    engine: Any = overdrive.engine
    held = [await engine.connect() for _ in range(engine.pool.capacity)]
    async with client(app) as http:
        await http.get("/ready")
        asking = overdrive.readiness._asking
        assert asking is not None
        await asyncio.wait([asking])
        assert (await http.get("/ready")).status_code == 200
    for connection in held:
        await connection.close()
    await overdrive.aclose()


SERVICE = """
import sys, uvicorn
from fastapi import FastAPI
from overdrive import Overdrive, Settings, create_engine, health_router
app = FastAPI()
Overdrive(app, settings=Settings(database_url=sys.argv[1], admission={"drain": float(sys.argv[3])}))
app.include_router(health_router)
uvicorn.run(app, port=int(sys.argv[2]), log_config=None)
"""


def started(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", SERVICE, *arguments], env=environment)


async def test_sigterm_is_told_by_ready_before_the_server_stops(sqlite_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = started(sqlite_url, str(port), "1")
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            for _ in range(500):
                try:
                    if (await http.get("/ready")).status_code == 200:
                        break
                except httpx2.TransportError:
                    await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            for _ in range(50):
                if (await http.get("/ready")).status_code == 503:
                    break
                await asyncio.sleep(0.01)
            assert (await http.get("/ready")).json() == UNREADY | {"reason": "draining"}
            # A server that had heard of it would have closed its socket by now.
            for _ in range(10):
                await asyncio.sleep(0.05)
                assert (await http.get("/live")).status_code == 200
        await eventually(lambda: process.poll() is not None, 10)
    finally:
        process.kill()
        process.wait()
