"""An app for several workers of one server, and that server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI, Response
from sqlalchemy import select, text, update
from support import Item, tables

from overdrive import Overdrive, Page, SessionDep, cached, paginate


class Workers:
    """A server's workers, each asked on a connection of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.by_pid: dict[int, httpx2.Client] = {}
        #: Requests for what is cached.
        self.sent = 0

    def read(self, http: httpx2.Client) -> httpx2.Response:
        """Ask for what is cached."""
        self.sent += 1
        return http.get("/items/1")

    def meet(self, number: int) -> None:
        """Connect until there is a connection to so many workers."""
        while len(self.by_pid) < number:
            http = httpx2.Client(transport=httpx2.HTTPTransport(uds=self._path), base_url="http://test", timeout=60)
            pid = http.get("/pid").json()
            if pid in self.by_pid:
                http.close()
            else:
                self.by_pid[pid] = http

    def close(self) -> None:
        for http in self.by_pid.values():
            http.close()
        self.by_pid.clear()


@contextmanager
def serving(url: str, directory: Path, workers: int) -> Iterator[Workers]:
    """Start the app below in so many workers of one uvicorn."""
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(text("INSERT INTO items (id, name) VALUES (1, '0')"))
        with database.connect() as connection:
            # Workers that switch a new file to its journal at once may find it locked.
            connection.execute(text("PRAGMA journal_mode = WAL"))
        path = str(directory / "server")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            descriptor = str(listening.fileno())
            server = subprocess.Popen(
                [
                    *(sys.executable, "-m", "uvicorn", "--factory", "workers:create", "--log-level", "error"),
                    *("--workers", str(workers), "--fd", descriptor),
                ],
                env={
                    **os.environ,
                    "DATABASE_URL": url,
                    "TMPDIR": str(directory),
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                },
                pass_fds=[listening.fileno()],
            )
        met = Workers(path)
        try:
            met.meet(workers)
            yield met
        finally:
            met.close()
            server.terminate()
            server.wait(60)


def create() -> FastAPI:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=os.environ["DATABASE_URL"], cache=True)
    app.include_router(overdrive.metrics_router())

    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()

    @app.get("/items/{item_id}")
    @cached
    async def item(item_id: int, db: SessionDep) -> str:
        return (await db.get_one(Item, item_id)).name

    @app.put("/items/{item_id}")
    async def rename(item_id: int, name: str, db: SessionDep) -> None:
        await db.execute(update(Item).where(Item.id == item_id).values(name=name))

    @app.get("/items", response_model=Page[int])
    async def items(db: SessionDep, response: Response) -> Any:
        return await paginate(db, select(Item.id).order_by(Item.id))

    return app
