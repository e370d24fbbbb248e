"""What is told of each request, to whom, and of how many."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fastapi import FastAPI
from loguru import logger as loguru_logger
from sqlalchemy import text

from overdrive import Overdrive, SessionDep, Settings, bind
from overdrive.errors import ConfigurationError
from overdrive.log.handler import LogHandler

pytestmark = pytest.mark.anyio


class Service:
    """An app, and the lines of its log."""

    def __init__(self, url: str, events_to: Any = None, **log: Any) -> None:
        self.app = FastAPI()
        settings = Settings(database_url=url, log=log)  # type: ignore[arg-type]
        self.overdrive = Overdrive(self.app, settings=settings, events_to=events_to)
        self.stream = io.StringIO()
        self.handler = LogHandler(stream=self.stream)

        @self.app.get("/items/{number}")
        async def item(number: int, db: SessionDep) -> int:
            bind(user=7)
            return (await db.execute(text("SELECT 100 / :number"), {"number": number})).scalar_one() // number

        @self.app.get("/health")
        async def health() -> str:
            return "ok"

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
            answer = await http.get(path)
        await self.overdrive.engine.dispose()
        return answer

    @property
    def lines(self) -> list[dict[str, Any]]:
        self.handler.flush()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    made: list[Service] = []
    logger = logging.getLogger("overdrive.request")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    # pytest's own handlers hear what propagates.
    logger.propagate = False

    def service(**options: Any) -> Service:
        made.append(Service(f"sqlite+aiosqlite:///{tmp_path / 'db'}", **options))
        logger.addHandler(made[-1].handler)
        return made[-1]

    yield service
    for each in made:
        logger.removeHandler(each.handler)
        each.handler.close()
    logger.setLevel(level)
    logger.propagate = propagate


async def test_an_event_is_one_line_with_what_was_bound(serve: Any) -> None:
    service = serve()
    await service.get("/items/5")
    [line] = service.lines
    assert (line["route"], line["status"], line["statements"], line["user"]) == ("/items/{number}", 200, 1, 7)
    assert line["message"].startswith("GET /items/5 200 ")
    assert service.handler.stats.emitted == 1


@pytest.mark.parametrize(
    ("trusted", "sent", "taken"),
    [
        (True, "abc-1.2_Z", True),
        (True, "x" * 128, True),
        (True, "x" * 129, False),
        (True, 'a"b', False),
        (True, "", False),
        (False, "abc", False),
    ],
)
async def test_only_a_trusted_header_names_the_request(serve: Any, trusted: bool, sent: str, taken: bool) -> None:
    service = serve(trust_request_id=trusted, request_id_header="X-Request-Id")
    answer = await service.get("/health", **{"x-request-id": sent})
    assert (answer.headers["x-request-id"] == sent) is taken
    assert service.lines[0]["request_id"] == answer.headers["x-request-id"]


async def test_probes_are_let_go_and_counted_and_errors_never(serve: Any) -> None:
    service = serve(sample={"/health": 0, "/items/{number}": 0})
    for path in ("/health", "/items/1", "/items/0", "/health", "/missing"):
        await service.get(path)
    assert [(line["path"], line["status"]) for line in service.lines] == [("/items/0", 500), ("/missing", 404)]
    assert service.handler.stats.sampled == {"INFO": 3}
    assert service.handler.stats.emitted == 5


async def test_a_share_of_events_is_kept_by_trace(serve: Any) -> None:
    service = serve(sample={"/health": 0.5})
    trace = [f"00-{number:032x}-{1:016x}-01" for number in range(1, 41)]
    kept = []
    for _ in range(2):
        for each in trace:
            await service.get("/health", traceparent=each)
        kept.append({line["trace_id"] for line in service.lines})
    assert kept[0] == kept[1]
    assert 5 < len(kept[0]) < 35
    stats = service.handler.stats
    assert stats.written + stats.sampled["INFO"] == 80


async def test_server_timing_says_where_the_time_went_if_wanted(serve: Any) -> None:
    answer = await serve(server_timing=True).get("/items/5")
    timing = dict(part.split(";", 1) for part in answer.headers["server-timing"].split(", "))
    assert timing.keys() == {"total", "db", "pool"}
    assert timing["db"].endswith('desc="1 statements"')
    assert "server-timing" not in (await serve().get("/items/5")).headers


async def test_events_go_to_structlog(serve: Any) -> None:
    told: list[Any] = []

    def keep(_logger: Any, _name: str, event: Any) -> Any:
        told.append(dict(event))
        raise structlog.DropEvent

    service = serve(events_to=structlog.wrap_logger(None, processors=[keep]))
    await service.get("/items/5")
    [event] = told
    assert event["event"].startswith("GET /items/5 200 ")
    assert (event["status"], event["route"], event["user"]) == (200, "/items/{number}", 7)
    assert service.lines == []


async def test_events_go_to_loguru(serve: Any) -> None:
    told: list[Any] = []
    sink = loguru_logger.add(lambda message: told.append(message.record))
    try:
        await serve(events_to=loguru_logger).get("/items/5")
    finally:
        loguru_logger.remove(sink)
    [record] = [each for each in told if each["extra"]]
    assert record["message"].startswith("GET /items/5 200 ")
    assert (record["extra"]["status"], record["extra"]["user"]) == (200, 7)


async def test_a_logger_that_fails_harms_no_request(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_logger: Any, _name: str, event: Any) -> Any:
        raise ValueError("no event")

    service = serve(events_to=structlog.wrap_logger(None, processors=[fail]))
    assert (await service.get("/health")).status_code == 200
    assert "an event could not be logged" in caplog.text


def test_events_to_a_logger_of_the_standard_library_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"overdrive\.request"):
        Overdrive(FastAPI(), events_to=logging.getLogger("x"))  # type: ignore[arg-type]


def test_loguru_writes_to_the_handler() -> None:
    stream = io.StringIO()
    handler = LogHandler(stream=stream)
    sink = loguru_logger.add(handler, format="{message}")
    loguru_logger.bind(user=7).warning("hello {}", "world")
    loguru_logger.remove(sink)
    line = json.loads(stream.getvalue())
    assert (line["message"], line["severity"], line["extra"]) == ("hello world", "WARNING", {"user": 7})


def test_structlog_writes_to_the_handler() -> None:
    stream = io.StringIO()
    logger = logging.Logger("app")
    logger.addHandler(LogHandler(stream=stream))
    structlog.wrap_logger(logger, processors=[structlog.stdlib.render_to_log_kwargs]).warning("hello", user=7)
    logger.handlers[0].close()
    line = json.loads(stream.getvalue())
    assert (line["message"], line["severity"], line["user"]) == ("hello", "WARNING", 7)
