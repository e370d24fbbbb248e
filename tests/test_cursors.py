"""Cursors through apps: damage, keys that are replaced, and keys that workers share."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pagination.cases import damaged
from pagination.service import numbered, served
from sqlalchemy import Engine, insert, text
from support import Item, call, client, tables

from overdrive import ConfigurationError, add_pagination
from overdrive.pagination.cursor import MAX_LENGTH

pytestmark = pytest.mark.anyio

OLD, NEW = "the old secret of the app", "the new secret of the app"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Engine]:
    with tables(sqlite_url) as engine:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"n{n % 5}"} for n in range(23)])
        yield engine


@pytest.fixture
async def app(sqlite_url: str, database: Engine) -> AsyncIterator[FastAPI]:
    app, overdrive = served(sqlite_url)
    yield app
    await overdrive.aclose()


async def next_cursor(http: httpx2.AsyncClient, path: str = "/feed?size=2") -> str:
    cursor = (await http.get(path)).json()["next_cursor"]
    assert isinstance(cursor, str)
    return cursor


async def test_damage_is_a_coded_400_and_never_a_page(app: FastAPI) -> None:
    async with client(app) as http:
        cursor = await next_cursor(http)
    for made in islice(damaged(cursor, random.Random(3)), 2_000):
        answer = await call(app, f"/feed?size=2&cursor={quote(made)}")
        assert answer.error is None
        assert (answer.status, b'"invalid_cursor"' in answer.body) == (400, True), made


@pytest.mark.parametrize("raw", ["%ff", "%00", "%ed%a0%80", "A" * (MAX_LENGTH + 1), "A" * 65_000, "a&cursor=b"])
async def test_what_is_no_text_of_a_cursor_is_a_4xx(app: FastAPI, raw: str) -> None:
    answer = await call(app, f"/feed?cursor={raw}")
    assert answer.error is None
    assert answer.status in (400, 422)


@pytest.mark.parametrize("foreign", ["/twin?size=2", "/feed?size=2&sort=z", "/feed?size=2&name=n1", "/feed?size=2&x=1"])
async def test_a_cursor_is_for_one_route_sort_and_filter(app: FastAPI, foreign: str) -> None:
    async with client(app) as http:
        cursor = await next_cursor(http)
        assert (await http.get(f"/feed?size=9&cursor={cursor}")).status_code == 200
        answer = await http.get(f"{foreign}&cursor={cursor}")
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
        back = await next_cursor(http, foreign)
        assert (await http.get(f"/feed?cursor={back}")).json()["code"] == "invalid_cursor"


async def test_the_last_page_and_the_way_back_from_it(app: FastAPI) -> None:
    async with client(app) as http:
        last = (await http.get("/feed?size=3&cursor=last")).json()
        assert ([item["id"] for item in last["items"]], last["next_cursor"]) == ([10, 15, 20], None)
        before = (await http.get("/feed", params={"size": 3, "cursor": last["prev_cursor"]})).json()
        assert [item["id"] for item in before["items"]] == [14, 19, 5]


async def test_a_key_is_replaced_without_breaking_walks(sqlite_url: str, database: Engine) -> None:
    apps = [served(sqlite_url, secrets=secrets) for secrets in (OLD, [NEW, OLD], [NEW])]
    before, meanwhile, after = (app for app, _ in apps)
    async with client(before) as old, client(meanwhile) as both, client(after) as new:
        cursor = await next_cursor(old)
        assert (await both.get(f"/feed?cursor={cursor}")).status_code == 200
        answer = await new.get(f"/feed?cursor={cursor}")
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
        cursor = await next_cursor(both)
        assert (await new.get(f"/feed?cursor={cursor}")).status_code == 200
        assert (await old.get(f"/feed?cursor={cursor}")).status_code == 400
    for _, overdrive in apps:
        await overdrive.aclose()


# Keys of several workers


def start(app: FastAPI) -> None:
    with TestClient(app):
        pass


@pytest.fixture(params=["WEB_CONCURRENCY", "gunicorn"])
def several_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "gunicorn":
        monkeypatch.setitem(sys.modules, "gunicorn.arbiter", sys)
    else:
        monkeypatch.setenv("WEB_CONCURRENCY", "2")


@pytest.mark.usefixtures("several_workers")
def test_workers_with_a_key_each_are_refused_at_start(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="OVERDRIVE_PAGINATION__SECRETS=") as caught:
        start(served(sqlite_url)[0])
    assert "GET /feed" in str(caught.value)
    start(served(sqlite_url, secrets=NEW)[0])
    start(numbered(sqlite_url))


def test_one_worker_needs_no_secret(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(served(sqlite_url)[0])
    for workers in ("1", "", "some"):
        monkeypatch.setenv("WEB_CONCURRENCY", workers)
        start(served(sqlite_url)[0])
    start(add_pagination(FastAPI()))


def test_workers_of_one_uvicorn_read_each_others_cursors(sqlite_url: str, database: Engine, tmp_path: Path) -> None:
    # Two workers that switch a new file to its journal at once may find it locked.
    with database.connect() as connection:
        connection.execute(text("PRAGMA journal_mode = WAL"))
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        # Who connects before the workers are there waits for them.
        listening.listen()
        descriptor = str(listening.fileno())
        command = [sys.executable, "-m", "uvicorn", "--factory", "pagination.service:workers"]
        server = subprocess.Popen(
            [*command, "--workers", "2", "--fd", descriptor, "--log-level", "error"],
            env={**os.environ, "DATABASE_URL": sqlite_url, "PYTHONPATH": str(Path(__file__).parent)},
            pass_fds=[listening.fileno()],
        )
    signed: dict[str, str] = {}
    read: set[tuple[str, str]] = set()

    def get(**params: Any) -> httpx2.Response:
        # A connection each, or one worker would serve them all.
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=path), timeout=60) as http:
            return http.get("http://test/feed", params={"size": 2, **params})

    try:
        while len(read) < 2:
            answer = get()
            signed[answer.headers["x-pid"]] = answer.json()["next_cursor"]
            for pid, cursor in signed.items():
                answer = get(cursor=cursor)
                assert answer.status_code == 200
                if answer.headers["x-pid"] != pid:
                    read.add((pid, answer.headers["x-pid"]))
    finally:
        server.terminate()
        server.wait(60)
