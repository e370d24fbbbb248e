"""An app that logs, on real servers, and clients that ask it until nobody answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

APP = """
import json, logging, os, time
from fastapi import FastAPI
from overdrive import LogHandler, Overdrive, Settings

handler = LogHandler("log")
logging.basicConfig(handlers=[handler], level="INFO", force=True)
logging.info("before a fork")
app = FastAPI()
overdrive = Overdrive(app, settings=Settings(log={"sample": {"/probe": 0}}))
logger = logging.getLogger("shop")


@app.get("/work/{name}")
async def work(name: str) -> None:
    for number in range(5):
        logger.info("line %d of %s", number, name)


@app.get("/probe")
async def probe() -> None:
    pass


@app.get("/hang")
async def hang() -> None:
    for number in range(5):
        logger.info("line %d of hang", number)
    time.sleep(60)


close = overdrive.aclose


async def aclose() -> None:
    logger.info("the end is near")
    await close()
    logger.info("the end")
    stats = handler.stats
    ledger = [stats.emitted, stats.written, sum(stats.sampled.values()), sum(stats.dropped.values())]
    with open(f"stats.{os.getpid()}", "w") as file:
        json.dump(ledger, file)


overdrive.aclose = aclose
"""
UVICORN = ("uvicorn", "served:app", "--uds", "socket", "--no-access-log")
GUNICORN = ("gunicorn", "served:app", "--bind", "unix:socket", "--worker-class", "uvicorn_worker.UvicornWorker")


@contextmanager
def serving(directory: Path, *command: str, app: str = APP, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    (directory / "served.py").write_text(app)
    with (directory / "output").open("wb") as output:
        given = {"stdout": output, "stderr": output, **streams}
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=directory, start_new_session=True, **given)
    try:
        deadline = time.monotonic() + 30
        while not listens(directory):
            assert process.poll() is None, (directory / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with closing(Client(directory)) as client:
            client.get("/probe")
        yield process
    finally:
        # Its workers too, whatever has become of it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def listens(directory: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(directory / "socket")) == 0


class Client(http.client.HTTPConnection):
    def __init__(self, directory: Path) -> None:
        super().__init__("test", timeout=20)
        self._path = str(directory / "socket")

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def get(self, path: str) -> int:
        self.request("GET", path)
        answer = self.getresponse()
        answer.read()
        return answer.status


class Load:
    """Clients that ask until nobody answers any more."""

    def __init__(self, directory: Path) -> None:
        self.answered: list[str] = []
        self._directory = directory
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _ask(self, client_number: int) -> None:
        # Until it does not listen any more.
        with closing(Client(self._directory)) as client, suppress(OSError, http.client.HTTPException):
            for number in range(100_000):
                client.get("/probe")
                assert client.get(f"/work/{client_number}-{number}") == 200
                self.answered.append(f"{client_number}-{number}")


def stop(directory: Path, command: tuple[str, ...], sent: signal.Signals, workers: int = 1) -> None:
    """Stop a server that is busy, and check that everything is there that was logged."""
    options = ("--workers", str(workers)) if workers > 1 else ()
    with serving(directory, *command, *options) as process, Load(directory) as load:
        deadline = time.monotonic() + 20
        # A worker that was forked writes too, and not only at its end.
        while len(load.answered) < 100 or f"line 4 of {load.answered[0]}" not in (directory / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        process.wait(30)
    _check(directory, load.answered, workers)


def _check(directory: Path, answered: list[str], workers: int) -> None:
    """Every line that was logged for an answered request is there once, and nothing is torn."""
    written = [json.loads(line) for line in (directory / "log").read_bytes().splitlines()]
    messages = Counter(line["message"] for line in written)
    events = Counter(line["path"] for line in written if line["logger"] == "overdrive.request")
    assert answered
    for name in answered:
        assert [messages[f"line {number} of {name}"] for number in range(5)] == [1] * 5
        assert events[f"/work/{name}"] == 1
    # A worker that was still starting has no end to tell of.
    assert 1 <= messages["the end is near"] == messages["the end"] <= workers
    ledgers = [json.loads(file.read_text()) for file in directory.glob("stats.*")]
    for emitted, written_lines, sampled, dropped in ledgers:
        assert emitted == written_lines + sampled
        assert dropped == 0
    assert len(ledgers) == workers
    # Its probe besides each of them.
    assert sum(sampled for _, _, sampled, _ in ledgers) >= len(answered)
